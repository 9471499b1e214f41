"""What the API server refuses with 422 in our kinds of objects, beyond wrong names and types.

Source: the API reference of each kind, https://kubernetes.io/docs/reference/kubernetes-api/, quoted.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

import kubeserver_schema
from kubeserver_podrules import (
    Cause,
    dns_label,
    dns_subdomain,
    duplicate,
    forbidden,
    invalid,
    labels,
    missing,
    one_of,
    pod_spec,
    qualified,
    unsupported,
)  # fmt: skip
from kubeserver_store import RESOURCES, Object, Refused

_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_LABELS = {"services", "namespaces"}  # kinds whose names are DNS labels; the others' are subdomains
KNOWN_FINALIZERS = {"orphan", "foregroundDeletion"}


def check_new(obj: Object) -> None:
    """Raises Refused 422."""
    _refuse(obj, [*_metadata(obj), *_body(obj)])


def check_update(obj: Object, old: Object) -> None:
    """Raises Refused 422."""
    causes = [*_metadata(obj), *_body(obj)]
    kept = set(obj["metadata"].get("finalizers", ())) <= set(old["metadata"].get("finalizers", ()))
    if old["metadata"].get("deletionTimestamp") and not kept:
        # https://kubernetes.io/docs/concepts/overview/working-with-objects/finalizers/
        words = "no new finalizers can be added if the object is being deleted"
        causes.append(forbidden("metadata.finalizers", words))
    changed = {"Job": _job_update, "Pod": _pod_update, "Service": _service_update, "Secret": _secret_update}
    if obj["kind"] in changed:
        causes += changed[obj["kind"]](obj, old)
    _refuse(obj, causes)


def _refuse(obj: Object, causes: list[Cause]) -> None:
    if not causes:
        return
    resource = next(one for one in RESOURCES.values() if one.kind == obj["kind"])
    name = obj["metadata"].get("name", "")
    kind = f"{obj['kind']}.{resource.group}" if resource.group else obj["kind"]
    words = [f"{cause.field}: {cause.words}" for cause in causes]
    message = f'{kind} "{name}" is invalid: {words[0] if len(words) == 1 else "[" + ", ".join(words) + "]"}'
    raise Refused(
        422, "Invalid", message,
        details={
            "name": name, "group": resource.group, "kind": obj["kind"],
            "causes": [{"reason": f"FieldValue{c.kind}", "message": c.words, "field": c.field} for c in causes],
        },
    )  # fmt: skip


def _metadata(obj: Object) -> Iterator[Cause]:
    metadata = obj["metadata"]
    name = metadata.get("name", "")
    if not name and not metadata.get("generateName"):
        yield missing("metadata.name", "name or generateName is required")
    elif obj["kind"] == "Service":
        # "must start with an alphabetic character": https://kubernetes.io/docs/concepts/overview/working-with-objects/
        # names/#rfc-1035-label-names, which services follow.
        if name and (len(name) > 63 or not _SERVICE_NAME.fullmatch(name)):
            words = (
                "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic"
            )
            yield invalid("metadata.name", name, f"{words} character, and end with an alphanumeric character")
    elif name:
        rule = dns_label if _plural(obj) in _LABELS else dns_subdomain
        yield from rule("metadata.name", name)
    yield from labels(metadata.get("labels", {}), "metadata.labels")
    yield from _annotations(metadata.get("annotations", {}))
    for finalizer in metadata.get("finalizers", ()):
        if finalizer not in KNOWN_FINALIZERS and "/" not in finalizer:
            yield invalid(
                "metadata.finalizers", finalizer, "name is neither a standard finalizer name nor is it fully qualified"
            )
    yield from _owners(metadata.get("ownerReferences", ()))


def _annotations(annotations: dict[str, str]) -> Iterator[Cause]:
    for key in annotations:
        yield from qualified("metadata.annotations", key.lower())
    if sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items()) > 256 * 1024:
        yield Cause("metadata.annotations", "TooLong", "Too long: may not be more than 262144 bytes")


def _owners(owners: list[Object] | tuple[()]) -> Iterator[Cause]:
    for index, owner in enumerate(owners):
        for name in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(name):
                words = f"{name} must not be empty"
                yield invalid(f"metadata.ownerReferences[{index}].{name}", "", words)
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        yield invalid("metadata.ownerReferences", "", "Only one reference can have Controller set to true")


def _plural(obj: Object) -> str:
    return next(one.plural for one in RESOURCES.values() if one.kind == obj["kind"])


def _body(obj: Object) -> Iterator[Cause]:
    for path in kubeserver_schema.required(obj, obj["kind"]):
        # The server looks for these itself, under the same names.
        if not path.startswith("status") and not path.endswith(("containers", ".name", ".mountPath", ".key")):
            yield missing(path)
    match obj["kind"]:
        case "Job":
            yield from _job(obj)
        case "Pod":
            yield from pod_spec(obj["spec"], "spec")
        case "Service":
            yield from _service(obj["spec"])
        case "Secret" | "ConfigMap":
            yield from _secret(obj)


def _job(job: Object) -> Iterator[Cause]:
    spec, template = job["spec"], job["spec"]["template"]
    for name in (
        "parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex",
        "maxFailedIndexes", "ttlSecondsAfterFinished",
    ):  # fmt: skip
        if spec.get(name, 0) < 0:
            yield invalid(f"spec.{name}", spec[name], "must be greater than or equal to 0")
    yield from _indexed(job)
    yield from labels(template.get("metadata", {}).get("labels", {}), "spec.template.labels")
    yield from pod_spec(template["spec"], "spec.template.spec")
    # "Only a RestartPolicy equal to Never or OnFailure is allowed."
    if template["spec"]["restartPolicy"] not in ("Never", "OnFailure"):
        if template["spec"]["restartPolicy"] == "Always":
            yield missing("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"')
        else:
            yield unsupported(
                "spec.template.spec.restartPolicy", template["spec"]["restartPolicy"], ("Never", "OnFailure")
            )
    yield from _selector(job)
    allowed = ("Failed",) if "podFailurePolicy" in spec else ("Failed", "TerminatingOrFailed")
    yield from one_of("spec.podReplacementPolicy", spec["podReplacementPolicy"], *allowed)
    if "podFailurePolicy" in spec:
        yield from _failure_policy(spec)


def _indexed(job: Object) -> Iterator[Cause]:
    spec = job["spec"]
    yield from one_of("spec.completionMode", spec["completionMode"], "Indexed", "NonIndexed")
    if spec["completionMode"] != "Indexed":
        if "backoffLimitPerIndex" in spec:
            yield invalid("spec.backoffLimitPerIndex", spec["backoffLimitPerIndex"], "requires indexed completion mode")
        if "successPolicy" in spec:
            yield invalid("spec.successPolicy", "", "requires indexed completion mode")
        return
    # "When value is `Indexed`, .spec.completions must be specified and `.spec.parallelism` must be less than or equal
    # to 10^5."
    if "completions" not in spec:
        yield missing("spec.completions", "when completion mode is Indexed")
        return
    if spec["parallelism"] > 100_000:
        words = "must be less than or equal to 100000 when completion mode is Indexed"
        yield invalid("spec.parallelism", spec["parallelism"], words)
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield missing("spec.backoffLimitPerIndex", "when maxFailedIndexes is specified")
    # https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode: the "Pod hostname, following the
    # pattern $(job-name)-$(index)", and a hostname is a DNS label.
    name = job["metadata"].get("name", "")
    if spec["completions"] > 0 and name:
        longest = f"{name}-{spec['completions'] - 1}"
        if any(dns_label("", longest)):
            words = f"will not able to create pod with invalid DNS label: {longest}"
            yield invalid("metadata.name", name, words)


def _selector(job: Object) -> Iterator[Cause]:
    spec = job["spec"]
    uid = job["metadata"].get("uid", "")
    if spec.get("manualSelector"):
        if "selector" not in spec:
            yield missing("spec.selector")
        return
    # "Normally, the system sets this field for you"; with another one the server says what it found.
    if spec["selector"].get("matchLabels") != {"batch.kubernetes.io/controller-uid": uid}:
        yield invalid("spec.selector", spec["selector"], "`selector` not auto-generated")
    expected = {f"{p}{n}": v for p in ("", "batch.kubernetes.io/") for n, v in _own_labels(job).items()}
    for key, value in expected.items():
        if spec["template"]["metadata"]["labels"].get(key) != value:
            yield invalid("spec.template.metadata.labels", {}, f"must be '{value}'")


def _own_labels(job: Object) -> dict[str, str]:
    return {"controller-uid": job["metadata"].get("uid", ""), "job-name": job["metadata"].get("name", "")}


def _failure_policy(spec: Object) -> Iterator[Cause]:
    at, rules = "spec.podFailurePolicy.rules", spec["podFailurePolicy"].get("rules", [])
    template = spec["template"]["spec"]
    # https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy: "you must also define that
    # Job's pod template with .spec.restartPolicy set to Never."
    if template["restartPolicy"] != "Never":
        words = 'only "Never" is supported when podFailurePolicy is specified'
        yield invalid("spec.template.spec.restartPolicy", template["restartPolicy"], words)
    if len(rules) > 20:  # "At most 20 elements are allowed."
        yield Cause(at, "TooMany", f"Too many: {len(rules)}: must have at most 20 items")
    containers = [c.get("name") for group in ("containers", "initContainers") for c in template.get(group, ())]
    for index, rule in enumerate(rules):
        place = f"{at}[{index}]"
        yield from one_of(f"{place}.action", rule.get("action"), "Count", "FailIndex", "FailJob", "Ignore")
        if rule.get("action") == "FailIndex" and "backoffLimitPerIndex" not in spec:
            words = "requires the backoffLimitPerIndex to be set"
            yield invalid(f"{place}.action", rule["action"], words)
        # "An empty rule [...] OnExitCodes and onPodConditions cannot be used" together.
        if ("onExitCodes" in rule) == bool(rule.get("onPodConditions")):
            words = "specifying one of OnExitCodes and OnPodConditions is required"
            if "onExitCodes" in rule:
                words = "specifying both OnExitCodes and OnPodConditions is not supported"
            yield invalid(place, "", words)
        if "onExitCodes" in rule:
            yield from _exit_codes(rule["onExitCodes"], f"{place}.onExitCodes", containers)
        for number, pattern in enumerate(rule.get("onPodConditions", ())):
            yield from one_of(
                f"{place}.onPodConditions[{number}].status", pattern["status"], "False", "True", "Unknown"
            )
            yield from qualified(f"{place}.onPodConditions[{number}].type", pattern.get("type", ""))


def _exit_codes(pattern: Object, at: str, containers: list[str | None]) -> Iterator[Cause]:
    values = pattern.get("values", [])
    yield from one_of(f"{at}.operator", pattern.get("operator"), "In", "NotIn")
    if pattern.get("containerName") not in (None, *containers):
        words = "must be one of the container or initContainer names in the pod template"
        yield invalid(f"{at}.containerName", pattern["containerName"], words)
    if not values:
        yield invalid(f"{at}.values", values, "at least one value is required")
    # "Each value in the list of values must be ordered and must not contain duplicates. Value '0' cannot be used for
    # the In operator."
    if 0 in values and pattern.get("operator") == "In":
        yield invalid(f"{at}.values[{values.index(0)}]", 0, "must not be 0 for the In operator")
    if values != sorted(values):
        yield invalid(f"{at}.values", values, "must be ordered")
    for number, value in enumerate(values):
        if value in values[:number]:
            yield duplicate(f"{at}.values[{number}]", str(value))


def _service(spec: Object) -> Iterator[Cause]:
    yield from one_of("spec.type", spec["type"], "ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
    headless = spec.get("clusterIP") == "None"
    if headless and spec["type"] in ("NodePort", "LoadBalancer"):
        yield invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {spec['type']} services")
    ports = spec.get("ports", ())
    if not ports and not headless and spec["type"] != "ExternalName":
        yield missing("spec.ports")
    names: set[str] = set()
    for index, port in enumerate(ports):
        at = f"spec.ports[{index}]"
        if not 0 < port.get("port", 0) < 65536:
            yield invalid(f"{at}.port", port.get("port", 0), "must be between 1 and 65535, inclusive")
        if not port.get("name") and len(ports) > 1:
            yield missing(f"{at}.name")
        if port.get("name"):
            yield from dns_label(f"{at}.name", port["name"])
            if port["name"] in names:
                yield duplicate(f"{at}.name", port["name"])
            names.add(port["name"])
    yield from labels(spec.get("selector", {}), "spec.selector")


def _secret(obj: Object) -> Iterator[Cause]:
    total = 0
    for key, value in obj.get("data", {}).items():
        # "Each key must consist of alphanumeric characters, '-', '_' or '.'."
        if not _SECRET_KEY.fullmatch(key):
            words = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
            yield invalid(f"data[{key}]", key, words)
        total += len(base64.b64decode(value)) if obj["kind"] == "Secret" else len(value.encode())
    if total > 1024 * 1024:
        yield Cause("data", "TooLong", "Too long: may not be more than 1048576 bytes")


def check_secret_encoding(obj: Object) -> None:
    """Raises Refused 400: what is no base64 can't even be read."""
    for value in (obj.get("data") or {}).values() if obj.get("kind") == "Secret" else ():
        try:
            base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            said = "illegal base64 data at input byte 0"
            raise Refused(400, "BadRequest", f'Secret in version "v1" cannot be handled as a Secret: {said}') from None


def _job_update(job: Object, old: Object) -> Iterator[Cause]:
    """https://kubernetes.io/docs/concepts/workloads/controllers/job/: parallelism, suspend and the limits may change;
    completions of an Indexed Job "in tandem with" parallelism; scheduling directives while it is suspended."""
    spec, before = job["spec"], old["spec"]
    if spec.get("completions") != before.get("completions") and not (
        spec["completionMode"] == "Indexed" and spec.get("completions") == spec["parallelism"]
    ):
        yield invalid("spec.completions", spec.get("completions"), "field is immutable")
    fixed = ("selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy")
    for name in fixed:
        if spec.get(name) != before.get(name):
            yield invalid(f"spec.{name}", spec.get(name), "field is immutable")
    if _without_directives(spec) != _without_directives(before) or (
        spec["template"] != before["template"] and not (before.get("suspend") and "startTime" not in old["status"])
    ):
        yield invalid("spec.template", {}, "field is immutable")


def _without_directives(spec: Object) -> Object:
    """ "The fields in a Job's pod template that can be updated are node affinity, node selector, tolerations, labels,
    annotations and scheduling gates." """
    template = spec["template"]
    metadata = {k: v for k, v in template.get("metadata", {}).items() if k not in ("labels", "annotations")}
    loose = ("nodeSelector", "tolerations", "affinity", "schedulingGates")
    return {"metadata": metadata, "spec": {k: v for k, v in template["spec"].items() if k not in loose}}


def _pod_update(pod: Object, old: Object) -> Iterator[Cause]:
    def fixed(spec: Object) -> Object:
        loose = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")
        kept = {name: value for name, value in spec.items() if name not in loose}
        for group in ("containers", "initContainers"):
            kept[group] = [{k: v for k, v in c.items() if k != "image"} for c in spec.get(group, ())]
        return kept

    before = old["spec"].get("tolerations", [])
    added_only = all(one in pod["spec"].get("tolerations", []) for one in before)
    if fixed(pod["spec"]) != fixed(old["spec"]) or not added_only:
        words = (
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
        )
        words += "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
        yield forbidden(
            "spec",
            f"{words}`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        )


def _service_update(service: Object, old: Object) -> Iterator[Cause]:
    if service["spec"].get("clusterIP") != old["spec"].get("clusterIP"):
        shown = [service["spec"].get("clusterIP")]
        yield invalid("spec.clusterIPs[0]", shown, "may not change once set")


def _secret_update(secret: Object, old: Object) -> Iterator[Cause]:
    if secret.get("type") != old.get("type"):
        yield invalid("type", secret.get("type"), "field is immutable")
    if old.get("immutable") and secret.get("data") != old.get("data"):
        yield forbidden("data", "field is immutable when `immutable` is set")
