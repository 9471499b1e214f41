"""Conditions of the tests' Kubernetes' objects, and the end of a pod that is nobody's failure."""

from __future__ import annotations

from kubeserver_store import Object, Store, delete, now


def evict(store: Store, pod: Object, reason: str, message: str, options: Object) -> None:
    """https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions: "A dedicated Pod
    DisruptionTarget condition is added to indicate that the Pod is about to be deleted due to a disruption." """
    key = ("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
    with store.changed:
        if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            store.edit(key, lambda one: set_condition(one, "DisruptionTarget", "True", reason, message))
        delete(store, key, options)


def set_condition(obj: Object, kind: str, status: str, reason: str = "", message: str = "") -> None:
    conditions = obj.setdefault("status", {}).setdefault("conditions", [])
    found = next((one for one in conditions if one["type"] == kind), None)
    if found is None:
        conditions.append(found := {"type": kind, "status": "", "lastTransitionTime": now()})
    elif found["status"] != status:
        found["lastTransitionTime"] = now()
    found["status"] = status
    for name, value in (("reason", reason), ("message", message)):
        if value:
            found[name] = value
        else:
            found.pop(name, None)
