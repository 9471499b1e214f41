"""What a PUT or a PATCH makes of an object that is there. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kubeserver_patch import json_patched, merged, strategic
from kubeserver_store import Object, Refused, Resource


def patched(old: Object, body: bytes, content_type: str, resource: Resource) -> Object:
    kinds: dict[str, Callable[[Object, Any], Any]] = {
        "application/merge-patch+json": merged,
        "application/strategic-merge-patch+json": lambda target, patch: strategic(target, patch, "", resource.kind),
        "application/json-patch+json": json_patched,
    }
    if content_type not in kinds:
        # Server-side apply is not simulated: it would need the record of who owns which field.
        words = "the body of the request was in an unknown format - accepted media types include: " + ", ".join(kinds)
        raise Refused(415, "UnsupportedMediaType", words)
    try:
        patch = json.loads(body)
    except ValueError as error:
        raise Refused(400, "BadRequest", f"error decoding patch: {error}") from None
    if isinstance(patch, list) != (content_type == "application/json-patch+json"):
        raise Refused(400, "BadRequest", "error decoding patch: json: cannot unmarshal into Go value")
    found: Object = kinds[content_type](old, patch)
    found |= {"kind": old["kind"], "apiVersion": old["apiVersion"]}
    return found


def assembled(old: Object, sent: Object, resource: Resource, subresource: str) -> Object:
    """What is written of what was sent: a subresource writes its part only, and nobody writes the server's own fields.

    https://kubernetes.io/docs/reference/using-api/api-concepts/#virtual-resources: "/status [...] allows users with
    access to status to modify it" and PUT and PATCH on the resource itself ignore it.
    """
    own = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "generateName")
    if subresource == "status":
        new = {**old, "status": sent.get("status", {})}
        given = sent["metadata"].get("resourceVersion")
        new["metadata"] = {**old["metadata"], "resourceVersion": given or old["metadata"]["resourceVersion"]}
        return new
    new = dict(sent)
    if "status" in resource.subresources:
        new["status"] = old.get("status", {})
    metadata = {name: value for name, value in sent["metadata"].items() if name not in own}
    metadata |= {name: old["metadata"][name] for name in own if name in old["metadata"]}
    new["metadata"] = metadata
    return new
