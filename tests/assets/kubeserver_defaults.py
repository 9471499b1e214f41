"""What the API server adds to what a client leaves out, so that clients see it in what they read back."""

from __future__ import annotations

import base64
from typing import Any

from kubeserver_store import Object

MAX_INT32 = 2**31 - 1


def default(obj: Object) -> None:
    """In place. The object has its uid."""
    match obj["kind"]:
        case "Job":
            _job(obj)
        case "Pod":
            pod_spec(obj.setdefault("spec", {}))
            _admit_pod(obj)
            obj.setdefault("status", {"phase": "Pending", "qosClass": _quality(obj["spec"])})
        case "Service":
            _service(obj)
        case "Secret":
            _secret(obj)
        case "PersistentVolumeClaim":
            obj.setdefault("status", {}).setdefault("phase", "Pending")
            obj.setdefault("spec", {}).setdefault("volumeMode", "Filesystem")


def _job(job: Object) -> None:
    """https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/ gives each default; "When both are
    unset, both are defaulted to 1." """
    spec = job.setdefault("spec", {})
    template = spec.setdefault("template", {})
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("completionMode", "NonIndexed")
    # "Defaults to 6, unless backoffLimitPerIndex (only Indexed Job) is specified. When [...] specified, backoffLimit
    # defaults to 2147483647."
    spec.setdefault("backoffLimit", MAX_INT32 if "backoffLimitPerIndex" in spec else 6)
    spec.setdefault("suspend", False)
    # "TerminatingOrFailed and Failed are the allowed values when podFailurePolicy is not in use", Failed is the only
    # and the default one where it is.
    spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    for rule in (spec.get("podFailurePolicy") or {}).get("rules", ()):
        for pattern in rule.get("onPodConditions", ()):
            pattern.setdefault("status", "True")  # "Defaults to True."
    if not spec.get("manualSelector"):
        _own_selector(job, spec, template)
    pod_spec(template.setdefault("spec", {}))
    job.setdefault("status", {})


def _own_selector(job: Object, spec: Object, template: Object) -> None:
    """https://kubernetes.io/docs/concepts/workloads/controllers/job/#specifying-your-own-pod-selector: "It picks a
    selector value that will not overlap with any other jobs." """
    metadata = job["metadata"]
    labels = template.setdefault("metadata", {}).setdefault("labels", {})
    for prefix in ("", "batch.kubernetes.io/"):
        labels.setdefault(f"{prefix}controller-uid", metadata["uid"])
        labels.setdefault(f"{prefix}job-name", metadata["name"])
    spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": metadata["uid"]}})


def pod_spec(spec: Object) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    spec.setdefault("terminationGracePeriodSeconds", 30)
    if "serviceAccountName" in spec:
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in (*spec.get("containers", ()), *spec.get("initContainers", ())):
        _container(container)
    for volume in spec.get("volumes", ()):
        for source in ("secret", "configMap", "projected", "downwardAPI"):
            if source in volume:
                volume[source].setdefault("defaultMode", 0o644)
        if "hostPath" in volume:
            volume["hostPath"].setdefault("type", "")


def _container(container: Object) -> None:
    image = container.get("image", "")
    # https://kubernetes.io/docs/concepts/containers/images/#imagepullpolicy-defaulting: Always for ":latest" and for no
    # tag at all, IfNotPresent otherwise.
    tag = image.rpartition("/")[2].partition(":")[2]
    policy = "Always" if tag in ("", "latest") and "@" not in image else "IfNotPresent"
    container.setdefault("imagePullPolicy", policy)
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    resources = container.setdefault("resources", {})
    if resources.get("limits"):
        # https://kubernetes.io/docs/concepts/configuration/manage-resources-containers/: "If you specify a limit for a
        # resource, but do not specify any request [...] Kubernetes copies the limit".
        for name, amount in resources["limits"].items():
            resources.setdefault("requests", {}).setdefault(name, amount)
    for port in container.get("ports", ()):
        port.setdefault("protocol", "TCP")
    for variable in container.get("env", ()):
        source: dict[str, Any] = variable.get("valueFrom", {})
        if "fieldRef" in source:
            source["fieldRef"].setdefault("apiVersion", "v1")


def _admit_pod(pod: Object) -> None:
    """What the admission plugins that are on by default add: Priority, ServiceAccount, DefaultTolerationSeconds.

    https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/: "Kubernetes automatically adds a
    toleration for node.kubernetes.io/not-ready and node.kubernetes.io/unreachable with tolerationSeconds=300, unless
    you, or a controller, set those tolerations explicitly."
    """
    spec = pod["spec"]
    spec.setdefault("enableServiceLinks", True)
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    spec.setdefault("serviceAccountName", "default")
    spec["serviceAccount"] = spec["serviceAccountName"]
    tolerations = spec.setdefault("tolerations", [])
    for taint in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(one.get("key") in (taint, None) and one.get("effect") in ("NoExecute", None) for one in tolerations):
            tolerations.append({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})


def _quality(spec: Object) -> str:
    """https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/."""
    kinds = [container.get("resources", {}) for container in spec.get("containers", ())]
    if not any(one.get("requests") or one.get("limits") for one in kinds):
        return "BestEffort"
    guaranteed = all(
        one.get("limits", {}).get(name) and one["limits"][name] == one.get("requests", {}).get(name)
        for one in kinds
        for name in ("cpu", "memory")
    )
    return "Guaranteed" if guaranteed else "Burstable"


def _service(service: Object) -> None:
    spec = service.setdefault("spec", {})
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    spec.setdefault("internalTrafficPolicy", "Cluster")
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    spec.setdefault("ipFamilies", ["IPv4"])
    for port in spec.get("ports", ()):
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port.get("port"))
    if spec.get("clusterIP"):
        spec.setdefault("clusterIPs", [spec["clusterIP"]])
    service.setdefault("status", {"loadBalancer": {}})


def _secret(secret: Object) -> None:
    """https://kubernetes.io/docs/concepts/configuration/secret/: "all key-value pairs in the stringData field are
    internally merged into the data field"."""
    secret.setdefault("type", "Opaque")
    for key, text in secret.pop("stringData", {}).items():
        secret.setdefault("data", {})[key] = base64.b64encode(text.encode()).decode()
