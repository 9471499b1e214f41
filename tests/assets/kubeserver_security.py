"""Pod Security Standards in the tests' Kubernetes: what a namespace's label forbids its pods.

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ and
https://kubernetes.io/docs/concepts/security/pod-security-admission/: "enforce: Policy violations will cause the pod to
be rejected", and "enforce mode is not applied to workload resources, only to the resulting pod objects".
"""

from __future__ import annotations

from collections.abc import Iterator

from kubeserver_store import Object, Refused, Store

LEVEL = "pod-security.kubernetes.io/enforce"
_BASELINE_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
_RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def check(store: Store, pod: Object) -> None:
    """Raises Refused 403."""
    namespace = store.get("namespaces", "", pod["metadata"]["namespace"])
    level = namespace["metadata"].get("labels", {}).get(LEVEL, "privileged")
    if level == "privileged":
        return
    found = [*_baseline(pod["spec"]), *(_restricted(pod["spec"]) if level == "restricted" else ())]
    if found:
        name = pod["metadata"].get("name") or pod["metadata"]["generateName"]
        words = f'pods "{name}" is forbidden: violates PodSecurity "{level}:latest": {", ".join(found)}'
        raise Refused(403, "Forbidden", words, details={"name": name, "kind": "pods"})


def _containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def _baseline(spec: Object) -> Iterator[str]:
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    if any("hostPath" in volume for volume in spec.get("volumes", ())):
        yield "hostPath volumes"
    contexts = [container.get("securityContext", {}) for container in _containers(spec)]
    if any(context.get("privileged") for context in contexts):
        yield "privileged"
    added = {name for context in contexts for name in context.get("capabilities", {}).get("add", ())}
    if added - _BASELINE_CAPABILITIES:
        yield "non-default capabilities"
    if any(port.get("hostPort") for container in _containers(spec) for port in container.get("ports", ())):
        yield "hostPort"


def _restricted(spec: Object) -> Iterator[str]:
    outer = spec.get("securityContext", {})
    contexts = [{**outer, **container.get("securityContext", {})} for container in _containers(spec)]
    if any(context.get("allowPrivilegeEscalation") is not False for context in contexts):
        yield "allowPrivilegeEscalation != false"
    for context in contexts:
        change = context.get("capabilities", {})
        if "ALL" not in change.get("drop", ()) or set(change.get("add", ())) - {"NET_BIND_SERVICE"}:
            yield "unrestricted capabilities"
            break
    if any(set(volume) - {"name"} - _RESTRICTED_VOLUMES for volume in spec.get("volumes", ())):
        yield "restricted volume types"
    if not all(context.get("runAsNonRoot") for context in contexts):
        yield "runAsNonRoot != true"
    if any(context.get("runAsUser") == 0 for context in contexts):
        yield "runAsUser=0"
    kinds = {context.get("seccompProfile", {}).get("type") for context in contexts}
    if not kinds <= {"RuntimeDefault", "Localhost"}:
        yield "seccompProfile"
