"""What stands between a request to create something and the object: defaults, rules, quota, service account.

Clients and the Job controller go through it alike.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from decimal import Decimal

import kubeserver_defaults
import kubeserver_rules
import kubeserver_security
from kubeserver_podrules import quantity
from kubeserver_store import RESOURCES, Object, Refused, Store


def create(store: Store, obj: Object, *, dry_run: bool = False) -> Object:
    """Raises Refused: 404 for the namespace, 403 for quota and service account, 409, 422."""
    with store.changed:
        obj = copy.deepcopy(obj)
        metadata = obj["metadata"]
        resource = next(one for one in RESOURCES.values() if one.kind == obj["kind"])
        if resource.namespaced and store.find("namespaces", "", metadata["namespace"]) is None:
            raise Refused(
                404, "NotFound", f'namespaces "{metadata["namespace"]}" not found',
                details={"name": metadata["namespace"], "kind": "namespaces"},
            )  # fmt: skip
        for name in ("resourceVersion", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
            if name == "resourceVersion" and metadata.get(name):
                raise Refused(500, "InternalError", "resourceVersion should not be set on objects to be created")
            metadata.pop(name, None)
        metadata["uid"] = str(uuid.uuid4())
        if resource.subresources:
            obj.pop("status", None)  # https://...api-conventions: status is written by controllers only
        kubeserver_defaults.default(obj)
        kubeserver_rules.check_new(obj)
        if obj["kind"] == "Service":
            _give_address(store, obj)
        if obj["kind"] == "Pod":
            _check_account(store, obj)
            kubeserver_security.check(store, obj)
        _check_quota(store, obj)
        if not dry_run:
            return store.create(obj)
        name = metadata.get("name") or metadata["generateName"] + "xxxxx"
        if store.find(resource.plural, metadata.get("namespace", ""), name) is not None:
            words = f'{resource.qualified} "{name}" already exists'
            raise Refused(409, "AlreadyExists", words, details={"name": name, "kind": resource.plural})
        metadata["name"] = name
        return obj


def _give_address(store: Store, service: Object) -> None:
    if service["spec"].get("clusterIP") or service["spec"]["type"] == "ExternalName":
        return
    taken = {one["spec"].get("clusterIP") for one in store.objects("services")}
    address = next(
        f"10.96.{i // 250}.{i % 250 + 1}" for i in range(10_000) if f"10.96.{i // 250}.{i % 250 + 1}" not in taken
    )
    service["spec"] |= {"clusterIP": address, "clusterIPs": [address]}


def _check_account(store: Store, pod: Object) -> None:
    """https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/: the admission controller
    "ensures that the ServiceAccount referenced by the Pod exists, and otherwise rejects the Pod"."""
    namespace, name = pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]
    if store.find("serviceaccounts", namespace, name) is None:
        shown = pod["metadata"].get("name") or pod["metadata"]["generateName"]
        why = f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found'
        raise Refused(403, "Forbidden", f'pods "{shown}" is forbidden: {why}', details={"name": shown, "kind": "pods"})


def _check_quota(store: Store, obj: Object) -> None:
    """https://kubernetes.io/docs/concepts/policy/resource-quotas/: "If creating or updating a resource violates a quota
    constraint, the control plane rejects that request with HTTP status code 403 Forbidden. The error includes a
    message explaining the constraint that would have been violated."

    "If quotas are enabled in a namespace for resource such as cpu and memory, users must specify requests or limits for
    those values when they define a Pod; otherwise, the quota system may reject pod creation."
    """
    namespace = obj["metadata"].get("namespace", "")
    asked = dict(usage([obj]))
    resource = next(one for one in RESOURCES.values() if one.kind == obj["kind"])
    name = obj["metadata"].get("name") or obj["metadata"].get("generateName", "")
    for quota in store.objects("resourcequotas", namespace):
        hard = {key: quantity(text) or Decimal(0) for key, text in quota["spec"].get("hard", {}).items()}
        title = f'{resource.qualified if resource.group else resource.plural} "{name}" is forbidden'
        details = {"name": name, "kind": resource.plural}
        needed = [key for key in hard if obj["kind"] == "Pod" and _is_amount(key) and key not in asked]
        if needed:
            words = f"{title}: failed quota: {quota['metadata']['name']}: must specify {', '.join(needed)}"
            raise Refused(403, "Forbidden", words, details=details)
        used = used_of(store, namespace)
        over = [key for key in hard if key in asked and used.get(key, Decimal(0)) + asked[key] > hard[key]]
        if over:
            shown = [
                f"{word}: " + ",".join(f"{key}={plain(amounts.get(key, Decimal(0)))}" for key in over)
                for word, amounts in (("requested", asked), ("used", used), ("limited", hard))
            ]
            words = f"{title}: exceeded quota: {quota['metadata']['name']}, {', '.join(shown)}"
            raise Refused(403, "Forbidden", words, details=details)


def _is_amount(key: str) -> bool:
    return key.removeprefix("requests.").removeprefix("limits.") in ("cpu", "memory")


def used_of(store: Store, namespace: str) -> dict[str, Decimal]:
    """Finished pods count no more: "in a non-terminal state"."""
    total: dict[str, Decimal] = {}
    for plural in ("pods", "jobs", "services", "secrets", "configmaps"):
        for obj in store.objects(plural, namespace):
            if plural == "pods" and obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                continue
            for key, amount in usage([obj]):
                total[key] = total.get(key, Decimal(0)) + amount
    return total


def usage(objects: list[Object]) -> Iterator[tuple[str, Decimal]]:
    for obj in objects:
        resource = next(one for one in RESOURCES.values() if one.kind == obj["kind"])
        yield f"count/{resource.qualified}", Decimal(1)
        if not resource.group:
            yield resource.plural, Decimal(1)
        if obj["kind"] != "Pod":
            continue
        for group in ("requests", "limits"):
            for name, amount in pod_amounts(obj["spec"], group).items():
                yield f"{group}.{name}", amount
                if group == "requests" and name in ("cpu", "memory"):
                    yield name, amount


def pod_amounts(spec: Object, group: str = "requests") -> dict[str, Decimal]:
    """What the pod takes of a node: the sum over its containers."""
    total: dict[str, Decimal] = {}
    for container in spec.get("containers", ()):
        for name, text in container.get("resources", {}).get(group, {}).items():
            total[name] = total.get(name, Decimal(0)) + (quantity(text) or Decimal(0))
    return total


def plain(amount: Decimal) -> str:
    return str(amount.to_integral_value()) if amount == amount.to_integral_value() else f"{int(amount * 1000)}m"
