"""The three ways to change an object by a part of it, and selectors. Pure functions.

https://kubernetes.io/docs/reference/using-api/api-concepts/#patch-and-apply
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from kubeserver_store import Object, Refused

# The lists of which a strategic merge joins the items, by key ("": plain values); every other list is replaced.
# https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/: "Whether the strategic
# merge patch replaces or merges a list depends on its patch strategy [...] specified by patchStrategy in a field tag".
_MERGE_KEYS = {
    "containers": "name", "initContainers": "name", "ephemeralContainers": "name", "volumes": "name", "env": "name",
    "volumeMounts": "mountPath", "volumeDevices": "devicePath", "imagePullSecrets": "name", "hostAliases": "ip",
    "finalizers": "", "ownerReferences": "uid", "conditions": "type", "topologySpreadConstraints": "topologyKey",
    "secrets": "name", "schedulingGates": "name", "resourceClaims": "name",
}  # fmt: skip


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def strategic(target: Any, patch: Any, name: str = "", kind: str = "") -> Any:
    """`patch` merged into `target`, the value of field `name`."""
    if isinstance(patch, list):
        return _strategic_list(target or [], patch, name, kind)
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.partition("/")[2]
            result[field] = [one for one in result.get(field, []) if one not in value]
        elif key.startswith("$"):
            if key not in ("$patch", "$retainKeys") and not key.startswith("$setElementOrder/"):
                raise Refused(400, "BadRequest", f"unknown directive {key} in a strategic merge patch")
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = strategic(result.get(key), value, key, kind)
    if "$retainKeys" in patch:
        result = {key: value for key, value in result.items() if key in patch["$retainKeys"]}
    return result


def _strategic_list(target: list[Any], patch: list[Any], name: str, kind: str) -> list[Any]:
    key = _MERGE_KEYS.get(name)
    if name == "ports":
        key = "port" if kind == "Service" else "containerPort"
    if key is None or any(isinstance(one, dict) and one.get("$patch") == "replace" for one in patch):
        return [copy.deepcopy(one) for one in patch if not (isinstance(one, dict) and "$patch" in one)]
    result = copy.deepcopy(target)
    for item in patch:
        if key == "":
            if item not in result:
                result.append(item)
            continue
        if key not in item:
            raise Refused(400, "BadRequest", f"map: {item} does not contain declared merge key: {key}")
        place = next((i for i, one in enumerate(result) if one.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            result = [one for one in result if one.get(key) != item[key]]
        elif place is None:
            result.append(copy.deepcopy(item))
        else:
            result[place] = strategic(result[place], item, "", kind)
    return result


def json_patched(target: Object, operations: list[Object]) -> Object:
    """RFC 6902. Raises Refused 422 for an operation that can't be done, as the server does."""
    result: Any = copy.deepcopy(target)
    for operation in operations:
        path = operation.get("path", "")
        try:
            result = _operated(result, operation, _pointer(path))
        except (KeyError, IndexError, ValueError, TypeError):
            words = f"the server rejected our request due to an error in our request: {operation.get('op')} {path}"
            raise Refused(422, "Invalid", words) from None
    found: Object = result
    return found


def _operated(document: Any, operation: Object, path: list[str]) -> Any:
    match operation.get("op"):
        case "test":
            if _at(document, path) != operation["value"]:
                raise ValueError(f"testing {operation['path']} failed")
            return document
        case "remove":
            _at(document, path)
            return _with(document, path, _remove)
        case "replace":
            _at(document, path)
            return _with(document, path, lambda holder, last: _set(holder, last, operation["value"], insert=False))
        case "add":
            return _with(document, path, lambda holder, last: _set(holder, last, operation["value"], insert=True))
        case "copy" | "move":
            value = copy.deepcopy(_at(document, _pointer(operation["from"])))
            if operation["op"] == "move":
                document = _with(document, _pointer(operation["from"]), _remove)
            return _with(document, path, lambda holder, last: _set(holder, last, value, insert=True))
    raise ValueError(f"no operation {operation.get('op')}")


def _pointer(path: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _at(document: Any, path: list[str]) -> Any:
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _with(document: Any, path: list[str], change: Callable[[Any, str], None]) -> Any:
    change(_at(document, path[:-1]), path[-1])
    return document


def _remove(holder: Any, last: str) -> None:
    del holder[int(last) if isinstance(holder, list) else last]


def _set(holder: Any, last: str, value: Any, *, insert: bool) -> None:
    if not isinstance(holder, list):
        holder[last] = value
    elif last == "-":
        holder.append(value)
    elif insert:
        if int(last) > len(holder):
            raise IndexError(last)
        holder.insert(int(last), value)
    else:
        holder[int(last)] = value


Predicate = Callable[[Object], bool]
_TERM = re.compile(r"\s*(?:(?P<absent>!)\s*)?(?P<key>[^\s=!,()]+)\s*(?P<operator>==?|!=|\bin\b|\bnotin\b)?\s*"
                   r"(?P<value>\([^)]*\)|[^,()\s]*)\s*(?:,|$)")  # fmt: skip


def label_selector(text: str) -> Predicate:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors. Raises Refused 400."""
    terms: list[Predicate] = []
    place = 0
    while place < len(text):
        found = _TERM.match(text, place)
        if not found or found.end() == place or (found["absent"] and found["operator"]):
            raise Refused(400, "BadRequest", f"unable to parse requirement: found '{text[place:]}'")
        terms.append(_term(found["key"], found["operator"], found["value"], absent=bool(found["absent"])))
        place = found.end()
    return lambda obj: all(term(obj["metadata"].get("labels") or {}) for term in terms)


def _term(key: str, operator: str | None, value: str, *, absent: bool) -> Predicate:
    values = [one.strip() for one in value.strip("()").split(",")]
    match operator:
        case None:
            return (lambda labels: key not in labels) if absent else (lambda labels: key in labels)
        case "=" | "==":
            return lambda labels: labels.get(key) == value
        case "!=":  # also "selects resources with no labels with" that key
            return lambda labels: labels.get(key) != value
        case "in":
            return lambda labels: labels.get(key) in values
    return lambda labels: labels.get(key) not in values


# https://kubernetes.io/docs/concepts/overview/working-with-objects/field-selectors/#list-of-supported-fields
_FIELDS = {
    "pods": (
        "spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork",
        "status.phase", "status.podIP", "status.nominatedNodeName",
    ),
    "events": (
        "involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
        "involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
        "reportingComponent", "source", "type",
    ),
    "secrets": ("type",),
    "nodes": ("spec.unschedulable",),
    "jobs": ("status.successful",),
    "namespaces": ("status.phase",),
}  # fmt: skip


def field_selector(text: str, plural: str) -> Predicate:
    """ "Using unsupported field selectors produces an error": Refused 400."""
    allowed = ("metadata.name", "metadata.namespace", *_FIELDS.get(plural, ()))
    terms: list[tuple[str, bool, str]] = []
    for term in filter(None, text.split(",")):
        field, operator, value = re.fullmatch(r"(.*?)(!=|==|=|$)(.*)", term).groups()  # type: ignore[union-attr]
        if field.strip() not in allowed:
            raise Refused(400, "BadRequest", f"field label not supported: {field}")
        terms.append((field.strip(), operator == "!=", value))
    return lambda obj: all((_field(obj, field) == value) != differs for field, differs, value in terms)


def _field(obj: Object, path: str) -> str:
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("component")
    return str(value).lower() if isinstance(value, bool) else str(value if value is not None else "")
