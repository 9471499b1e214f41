"""`cluster.kubernetes.pod` over what dtrain makes of a pod. Pure.

The rules are those of a strategic merge patch (kubernetes.io, "Update API Objects in Place Using kubectl patch"), but a
list without names is appended to instead of replaced: who adds a toleration means to add one.
"""

from __future__ import annotations

from typing import Any

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "hostAliases": "ip",
}


def overlay(base: Any, patch: Any, field: str = "") -> Any:
    """`patch` over `base`, both as JSON. Mappings merge key by key, null takes a key out; lists of things with a name
    of their own merge by it, others are joined; all else is replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {**base, **{key: overlay(base.get(key), value, key) for key, value in patch.items()}}
        return {key: value for key, value in merged.items() if key not in patch or value is not None}
    if isinstance(base, list) and isinstance(patch, list):
        key = _KEYS.get(field)
        return [*base, *patch] if key is None else _by_key(base, patch, key)
    return _without_nulls(patch)


def _by_key(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    found = {one.get(key): one for one in base}
    for one in patch:
        name = one.get(key) if isinstance(one, dict) else None
        found[name if name is not None else object()] = overlay(found.get(name), one)
    return list(found.values())


def _without_nulls(patch: Any) -> Any:
    if isinstance(patch, dict):
        return {key: _without_nulls(value) for key, value in patch.items() if value is not None}
    return patch
