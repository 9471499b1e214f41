"""Objects against the published schemas of one release: what a field is called and of which type.

kubernetes-validate brings the schemas. The meaning of values is kubeserver_rules.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from kubeserver_store import Object, Refused

RELEASE = "1.37.0"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,),
}  # fmt: skip


@cache
def _definitions() -> dict[str, Any]:
    path = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{RELEASE}-local" / "_definitions.json"
    found: dict[str, Any] = json.loads(path.read_text())["$defs"]
    return found


_NAMES = {
    "Job": "io.k8s.api.batch.v1.Job",
    "Eviction": "io.k8s.api.policy.v1.Eviction",
    "DeleteOptions": "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions",
    "SelfSubjectAccessReview": "io.k8s.api.authorization.v1.SelfSubjectAccessReview",
}


def decode(obj: Object, kind: str) -> tuple[Object, list[str]]:
    """The object without fields that the release does not know, and those fields' paths. Raises Refused 400 for a value
    of another type.

    https://kubernetes.io/docs/reference/using-api/api-concepts/#field-validation: with Ignore and Warn "the API server
    [...] drops any unrecognized or duplicate fields".
    """
    schema = _definitions()[_NAMES.get(kind, f"io.k8s.api.core.v1.{kind}")]
    unknown: list[str] = []
    found = _decoded(obj, schema, "", unknown, kind)
    assert isinstance(found, dict)
    return found, unknown


def required(obj: Object, kind: str) -> Iterator[str]:
    """Paths of fields that must be there and are not."""
    yield from _required(obj, _definitions()[_NAMES.get(kind, f"io.k8s.api.core.v1.{kind}")], "")


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = _definitions()[schema["$ref"].rpartition("/")[2]]
    return schema


def _kinds(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    found = [kinds] if isinstance(kinds, str) else [*kinds]
    for one in schema.get("oneOf", ()):
        found += _kinds(one)
    return [kind for kind in found if kind != "null"]


def _decoded(value: Any, schema: dict[str, Any], path: str, unknown: list[str], kind: str) -> Any:
    schema = _resolved(schema)
    kinds = _kinds(schema)
    if value is None or not kinds:
        return value
    if (isinstance(value, bool) and "boolean" not in kinds) or not isinstance(value, tuple(_accepted(kinds))):
        said = f"json: cannot unmarshal {_go_name(value)} into Go struct field {kind}.{path} of type {kinds[0]}"
        raise Refused(400, "BadRequest", f'{kind} in version "v1" cannot be handled as a {kind}: {said}')
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_decoded(one, items, f"{path}[{i}]", unknown, kind) for i, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    known, others = schema.get("properties"), schema.get("additionalProperties")
    result: Object = {}
    for name, one in value.items():
        place = f"{path}.{name}" if path else name
        if known is not None and name in known:
            result[name] = _decoded(one, known[name], place, unknown, kind)
        elif isinstance(others, dict):
            result[name] = _decoded(one, others, place, unknown, kind)
        elif known is None:
            result[name] = one
        else:
            unknown.append(place)
    # null is the same as absent
    return {name: one for name, one in result.items() if one is not None} if known is not None else result


def _accepted(kinds: list[str]) -> Iterator[type]:
    for kind in kinds:
        yield from _TYPES[kind]


def _go_name(value: object) -> str:
    names: dict[type, str] = {str: "string", bool: "bool", int: "number", float: "number", list: "array"}
    return names.get(type(value), "object")


def _required(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    schema = _resolved(schema)
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _required(one, schema.get("items", {}), f"{path}[{index}]")
    if not isinstance(value, dict):
        return
    for name in schema.get("required", ()):
        if value.get(name) is None:
            yield f"{path}.{name}".lstrip(".")
    for name, one in value.items():
        inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if isinstance(inner, dict):
            yield from _required(one, inner, f"{path}.{name}".lstrip("."))
