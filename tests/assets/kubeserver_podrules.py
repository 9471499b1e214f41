"""What the API server refuses in a pod's specification, beyond wrong names and types.

Source: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/, whose sentences are quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from kubeserver_store import Object

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
LABEL_WORDS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character"
)
SUBDOMAIN_WORDS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character"
)
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?")
_STANDARD = {"cpu", "memory", "ephemeral-storage"}


@dataclass(frozen=True, slots=True)
class Cause:
    field: str
    kind: str  # Required, Invalid, NotSupported, Duplicate, Forbidden, NotFound, TooLong
    words: str


def invalid(field: str, value: Any, words: str) -> Cause:
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return Cause(field, "Invalid", f"Invalid value: {shown}: {words}")


def missing(field: str, words: str = "") -> Cause:
    return Cause(field, "Required", f"Required value{': ' + words if words else ''}")


def unsupported(field: str, value: str, allowed: Sequence[str]) -> Cause:
    words = ", ".join(f'"{one}"' for one in sorted(allowed))
    return Cause(field, "NotSupported", f'Unsupported value: "{value}": supported values: {words}')


def forbidden(field: str, words: str) -> Cause:
    return Cause(field, "Forbidden", f"Forbidden: {words}")


def duplicate(field: str, value: str) -> Cause:
    return Cause(field, "Duplicate", f'Duplicate value: "{value}"')


def dns_label(field: str, value: str) -> Iterator[Cause]:
    if len(value) > 63:
        yield invalid(field, value, "must be no more than 63 characters")
    if not LABEL.fullmatch(value):
        yield invalid(field, value, LABEL_WORDS)


def dns_subdomain(field: str, value: str) -> Iterator[Cause]:
    if len(value) > 253:
        yield invalid(field, value, "must be no more than 253 characters")
    if not SUBDOMAIN.fullmatch(value):
        yield invalid(field, value, SUBDOMAIN_WORDS)


def one_of(field: str, value: str | None, *allowed: str) -> Iterator[Cause]:
    if value is not None and value not in allowed:
        yield unsupported(field, value, allowed)


def quantity(text: str | float) -> Decimal | None:
    """In units. https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/."""
    found = _QUANTITY.fullmatch(str(text))
    if not found:
        return None
    number, suffix = found[1], found[2] or ""
    try:
        if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix != "Ei":
            return Decimal(number) * Decimal(10) ** int(suffix[1:])
        powers = {name: Decimal(1000) ** (i + 1) for i, name in enumerate("kMGTPE")}
        powers |= {f"{name}i": Decimal(1024) ** (i + 1) for i, name in enumerate("KMGTPE")}
        return Decimal(number) * {"": Decimal(1), "m": Decimal("0.001"), **powers}[suffix]
    except InvalidOperation:
        return None


def pod_spec(spec: Object, at: str) -> Iterator[Cause]:
    volumes = [volume.get("name", "") for volume in spec.get("volumes", ())]
    yield from _volumes(spec.get("volumes", ()), f"{at}.volumes")
    if not spec.get("containers"):
        yield missing(f"{at}.containers")
    names: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group, ())):
            place = f"{at}.{group}[{index}]"
            yield from _container(container, place, volumes)
            if container.get("name") in names:
                yield duplicate(f"{place}.name", container["name"])
            names.add(container.get("name", ""))
    yield from one_of(f"{at}.restartPolicy", spec.get("restartPolicy"), "Always", "OnFailure", "Never")
    dns = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
    yield from one_of(f"{at}.dnsPolicy", spec.get("dnsPolicy"), *dns)
    for name in ("hostname", "subdomain"):
        if spec.get(name):
            yield from dns_label(f"{at}.{name}", spec[name])
    if spec.get("serviceAccountName"):
        yield from dns_subdomain(f"{at}.serviceAccountName", spec["serviceAccountName"])
    if spec.get("terminationGracePeriodSeconds", 0) < 0:
        yield invalid(f"{at}.terminationGracePeriodSeconds", spec["terminationGracePeriodSeconds"], "must be >= 0")
    if "activeDeadlineSeconds" in spec and spec["activeDeadlineSeconds"] < 1:
        words = "must be between 1 and 2147483647, inclusive"
        yield invalid(f"{at}.activeDeadlineSeconds", spec["activeDeadlineSeconds"], words)
    yield from _user(spec.get("securityContext", {}), f"{at}.securityContext")
    yield from _tolerations(spec.get("tolerations", ()), f"{at}.tolerations")
    yield from labels(spec.get("nodeSelector", {}), f"{at}.nodeSelector")
    yield from _affinity(spec.get("affinity", {}), f"{at}.affinity")


def labels(given: dict[str, str], at: str) -> Iterator[Cause]:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/: "Valid label value: must be 63
    characters or less [...] unless empty, must begin and end with an alphanumeric character"."""
    for key, value in given.items():
        yield from qualified(at, key)
        if len(value) > 63:
            yield invalid(at, value, "must be no more than 63 characters")
        if value and not QUALIFIED.fullmatch(value):
            words = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and"
            yield invalid(at, value, f"{words} must start and end with an alphanumeric character")


def qualified(at: str, key: str) -> Iterator[Cause]:
    prefix, slash, name = key.rpartition("/")
    if slash and not SUBDOMAIN.fullmatch(prefix):
        yield invalid(at, key, f"prefix part {SUBDOMAIN_WORDS}")
    if not name or len(name) > 63 or not QUALIFIED.fullmatch(name):
        words = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an"
        yield invalid(at, key, f"{words} alphanumeric character, and be no more than 63 characters")


def _container(container: Object, at: str, volumes: Sequence[str]) -> Iterator[Cause]:
    if not container.get("name"):
        yield missing(f"{at}.name")
    else:
        yield from dns_label(f"{at}.name", container["name"])
    image = container.get("image", "")
    if not image:
        yield missing(f"{at}.image")
    elif image != image.strip():
        yield invalid(f"{at}.image", image, "must not have leading or trailing whitespace")
    yield from one_of(f"{at}.imagePullPolicy", container.get("imagePullPolicy"), "Always", "IfNotPresent", "Never")
    for index, variable in enumerate(container.get("env", ())):
        yield from _variable(variable, f"{at}.env[{index}]")
    for index, source in enumerate(container.get("envFrom", ())):
        found = [name for name in ("configMapRef", "secretRef") if name in source]
        if len(found) != 1:
            yield invalid(f"{at}.envFrom[{index}]", "", "must specify one of: `configMapRef` or `secretRef`")
    yield from _mounts(container.get("volumeMounts", ()), f"{at}.volumeMounts", volumes)
    yield from _resources(container.get("resources", {}), f"{at}.resources")
    yield from _user(container.get("securityContext", {}), f"{at}.securityContext")
    for index, port in enumerate(container.get("ports", ())):
        if not 0 < port.get("containerPort", 0) < 65536:
            words = "must be between 1 and 65535, inclusive"
            yield invalid(f"{at}.ports[{index}].containerPort", port.get("containerPort", 0), words)


def _variable(variable: Object, at: str) -> Iterator[Cause]:
    name = variable.get("name", "")
    if not name:
        yield missing(f"{at}.name")
    elif not all(" " <= c <= "~" and c != "=" for c in name):
        words = "a valid environment variable name must consist only of printable ASCII characters other than '='"
        yield invalid(f"{at}.name", name, words)
    if "valueFrom" not in variable:
        return
    if variable.get("value"):
        yield invalid(f"{at}.valueFrom", "", "may not be specified when `value` is not empty")
    sources = ("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef")
    if len([one for one in sources if one in variable["valueFrom"]]) != 1:
        words = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef`"
        yield invalid(f"{at}.valueFrom", "", words)
    for source in ("configMapKeyRef", "secretKeyRef"):
        if source in variable["valueFrom"] and not variable["valueFrom"][source].get("key"):
            yield missing(f"{at}.valueFrom.{source}.key")


def _mounts(mounts: Sequence[Object], at: str, volumes: Sequence[str]) -> Iterator[Cause]:
    paths: set[str] = set()
    for index, mount in enumerate(mounts):
        place, path = f"{at}[{index}]", mount.get("mountPath", "")
        if not mount.get("name"):
            yield missing(f"{place}.name")
        elif mount["name"] not in volumes:
            yield Cause(f"{place}.name", "NotFound", f'Not found: "{mount["name"]}"')
        if not path:
            yield missing(f"{place}.mountPath")
        if ":" in path:  # "Must not contain ':'."
            yield invalid(f"{place}.mountPath", path, "must not contain ':'")
        if path in paths:
            yield invalid(f"{place}.mountPath", path, "must be unique")
        paths.add(path)
        sub_path = mount.get("subPath", "")
        if sub_path.startswith("/"):
            yield invalid(f"{place}.subPath", sub_path, "must be a relative path")
        if ".." in sub_path.split("/"):
            yield invalid(f"{place}.subPath", sub_path, "must not contain '..'")


def _volumes(volumes: Sequence[Object], at: str) -> Iterator[Cause]:
    names: set[str] = set()
    for index, volume in enumerate(volumes):
        place, name = f"{at}[{index}]", volume.get("name", "")
        yield from dns_label(f"{place}.name", name) if name else [missing(f"{place}.name")]
        if name in names:
            yield duplicate(f"{place}.name", name)
        names.add(name)
        sources = [one for one in volume if one != "name"]
        if not sources:
            yield missing(place, "must specify a volume type")
        if len(sources) > 1:
            yield forbidden(f"{place}.{sources[1]}", "may not specify more than 1 volume type")
        medium = volume.get("emptyDir", {}).get("medium", "")
        if medium not in ("", "Memory") and not medium.startswith("HugePages"):
            yield unsupported(f"{place}.emptyDir.medium", medium, ("HugePages", "Memory"))
        if "hostPath" in volume:
            path = volume["hostPath"].get("path", "")
            if ".." in path.split("/"):
                yield invalid(f"{place}.hostPath.path", path, "must not contain '..'")
        for source, key in (("persistentVolumeClaim", "claimName"), ("secret", "secretName"), ("nfs", "server")):
            if source in volume and not volume[source].get(key):
                yield missing(f"{place}.{source}.{key}")
        if "nfs" in volume and not volume["nfs"].get("path", "").startswith("/"):
            yield invalid(f"{place}.nfs.path", volume["nfs"].get("path", ""), "must be an absolute path")


def _resources(resources: Object, at: str) -> Iterator[Cause]:
    amounts: dict[str, dict[str, Decimal]] = {"limits": {}, "requests": {}}
    for group, found in amounts.items():
        for name, text in resources.get(group, {}).items():
            place, amount = f"{at}.{group}[{name}]", quantity(text)
            if amount is None:
                words = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                yield invalid(place, text, words)
                continue
            found[name] = amount
            yield from qualified(place, name)
            if "/" not in name and name not in _STANDARD and not name.startswith("hugepages-"):
                yield invalid(place, name, "must be a standard resource type or fully qualified")
            if amount < 0:
                yield invalid(place, text, "must be greater than or equal to 0")
            if "/" in name and amount != amount.to_integral_value():
                yield invalid(place, text, "must be an integer")
    for name, amount in amounts["requests"].items():
        limit = amounts["limits"].get(name)
        place = f"{at}.requests"
        if limit is not None and amount > limit:
            words = f"must be less than or equal to {name} limit of {resources['limits'][name]}"
            yield invalid(place, resources["requests"][name], words)
        # https://kubernetes.io/docs/tasks/manage-gpus/scheduling-gpus/: "You cannot specify GPU requests without
        # specifying limits"; "If you specify both, these two values must be equal."
        if "/" in name and limit is None:
            yield missing(f"{at}.limits", "Limit must be set for non overcommitable resources")
        if "/" in name and limit is not None and limit != amount:
            words = f"must be equal to {name} limit of {resources['limits'][name]}"
            yield invalid(place, resources["requests"][name], words)


def _user(context: Object, at: str) -> Iterator[Cause]:
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        if name in context and not 0 <= context[name] <= 2**31 - 1:
            yield invalid(f"{at}.{name}", context[name], "must be between 0 and 2147483647, inclusive")
    kind = context.get("seccompProfile", {}).get("type")
    yield from one_of(f"{at}.seccompProfile.type", kind, "Localhost", "RuntimeDefault", "Unconfined")
    capabilities = context.get("capabilities", {}).get("add", ())
    if context.get("allowPrivilegeEscalation") is False and (context.get("privileged") or "SYS_ADMIN" in capabilities):
        words = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true"
        yield invalid(at, "", words)


def _tolerations(tolerations: Sequence[Object], at: str) -> Iterator[Cause]:
    for index, one in enumerate(tolerations):
        place, operator = f"{at}[{index}]", one.get("operator", "Equal")
        yield from one_of(f"{place}.operator", operator, "Equal", "Exists", "Gt", "Lt")
        yield from one_of(f"{place}.effect", one.get("effect"), "NoExecute", "NoSchedule", "PreferNoSchedule")
        if one.get("key"):
            yield from qualified(f"{place}.key", one["key"])
        elif operator != "Exists":
            # "If the key is empty, operator must be Exists"
            words = 'operator must be Exists when `key` is empty, which means "match all values and all keys"'
            yield invalid(f"{place}.operator", operator, words)
        if operator == "Exists" and one.get("value"):
            yield invalid(f"{place}.operator", one["value"], "value must be empty when `operator` is 'Exists'")
        if "tolerationSeconds" in one and one.get("effect") != "NoExecute":
            # "which must be of effect NoExecute, otherwise this field is ignored" - and refused by the server.
            words = "effect must be 'NoExecute' when `tolerationSeconds` is set"
            yield invalid(f"{place}.effect", one.get("effect", ""), words)


def _affinity(affinity: Object, at: str) -> Iterator[Cause]:
    required, preferred = (f"{one}DuringSchedulingIgnoredDuringExecution" for one in ("required", "preferred"))
    terms = affinity.get("nodeAffinity", {}).get(required, {}).get("nodeSelectorTerms", ())
    nodes = [(f"{required}.nodeSelectorTerms[{i}]", term) for i, term in enumerate(terms)]
    for i, weighted in enumerate(affinity.get("nodeAffinity", {}).get(preferred, ())):
        nodes.append((f"{preferred}[{i}].preference", weighted.get("preference", {})))
    for place, term in nodes:
        yield from _expressions(term, f"{at}.nodeAffinity.{place}", ("Gt", "Lt"))
    for kind in ("podAffinity", "podAntiAffinity"):
        pods = [(f"{required}[{i}]", t) for i, t in enumerate(affinity.get(kind, {}).get(required, ()))]
        for i, weighted in enumerate(affinity.get(kind, {}).get(preferred, ())):
            pods.append((f"{preferred}[{i}].podAffinityTerm", weighted.get("podAffinityTerm", {})))
            if not 1 <= weighted.get("weight", 0) <= 100:
                words = "must be in the range 1-100"
                yield invalid(f"{at}.{kind}.{preferred}[{i}].weight", weighted.get("weight", 0), words)
        for place, term in pods:
            yield from _expressions(term.get("labelSelector", {}), f"{at}.{kind}.{place}.labelSelector", ())
            if not term.get("topologyKey"):
                yield missing(f"{at}.{kind}.{place}.topologyKey", "can not be empty")


def _expressions(selector: Object, at: str, more: Sequence[str]) -> Iterator[Cause]:
    """NodeSelectorRequirement: "If the operator is In or NotIn, the values array must be non-empty. If the operator is
    Exists or DoesNotExist, the values array must be empty. If the operator is Gt or Lt, the values array must have a
    single element". LabelSelectorRequirement has no Gt and Lt."""
    for index, one in enumerate(selector.get("matchExpressions", ())):
        place, operator, values = f"{at}.matchExpressions[{index}]", one.get("operator", ""), one.get("values", ())
        if operator in ("In", "NotIn"):
            if not values:
                yield missing(f"{place}.values", "must be specified when `operator` is 'In' or 'NotIn'")
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                words = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                yield forbidden(f"{place}.values", words)
        elif operator not in more:
            yield invalid(f"{place}.operator", operator, "not a valid selector operator")
        elif len(values) != 1:
            yield missing(f"{place}.values", "must be specified single value when `operator` is 'Lt' or 'Gt'")
