"""The garbage collector of the tests' Kubernetes, and what else removes objects that nobody asked to remove.

Source: https://kubernetes.io/docs/concepts/architecture/garbage-collection/ and
https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-garbage-collection
"""

from __future__ import annotations

from functools import partial

from kubeserver_conditions import set_condition
from kubeserver_jobfacts import expired
from kubeserver_store import Object, Store, delete, key_of


def collect(store: Store) -> None:
    """Once, under the store's lock."""
    for job in store.objects("jobs"):
        if expired(job) and "deletionTimestamp" not in job["metadata"]:
            delete(store, key_of(job), {"propagationPolicy": "Foreground"})
    everything = [
        one for plural in ("jobs", "pods", "services", "secrets", "configmaps") for one in store.objects(plural)
    ]
    present = {one["metadata"]["uid"] for one in everything}
    for owner in everything:
        finalizers = owner["metadata"].get("finalizers", ())
        if "deletionTimestamp" not in owner["metadata"]:
            continue
        dependents = [one for one in everything if owner["metadata"]["uid"] in _owners(one)]
        if "orphan" in finalizers:
            # "Orphaned dependents": they stay and lose their owner.
            for one in dependents:
                store.edit(key_of(one), partial(_disown, uid=owner["metadata"]["uid"]))
            store.edit(key_of(owner), lambda obj: _drop(obj, "orphan"))
        elif "foregroundDeletion" in finalizers:
            # "Once the deletion in progress state is set, the garbage collector deletes the object's dependents"; only
            # those with blockOwnerDeletion keep the owner.
            for one in dependents:
                _remove(store, one)
            uid = owner["metadata"]["uid"]
            if not any(_blocks(one, uid) for one in dependents if store.find(*key_of(one))):
                store.edit(key_of(owner), lambda obj: _drop(obj, "foregroundDeletion"))
    for one in everything:
        # "Background cascading deletion": the owner is gone at once, "the garbage collector cleans up the dependent
        # objects in the background" - where all of its owners are gone.
        if _owners(one) and not _owners(one) & present:
            _remove(store, one)


def collect_pods(store: Store) -> None:
    """Pods that no kubelet will end: "PodGC cleans up any Pods which [...] are orphan pods, bound to a node which no
    longer exists; are unscheduled terminating pods; are terminating pods, bound to a non-ready node tainted with
    node.kubernetes.io/out-of-service". "Along with cleaning up the Pods, PodGC will also mark them as failed if they
    are in a non-terminal phase." """
    nodes = {one["metadata"]["name"]: one for one in store.objects("nodes")}
    for pod in store.objects("pods"):
        name = pod["spec"].get("nodeName")
        terminating = "deletionTimestamp" in pod["metadata"]
        orphan = name is not None and name not in nodes
        if not (orphan or (terminating and (name is None or _is_out_of_service(nodes[name])))):
            continue
        if pod["status"].get("phase") not in ("Succeeded", "Failed"):
            store.edit(key_of(pod), partial(_fail, disrupted=name is not None))
        if store.find(*key_of(pod)):
            delete(store, key_of(pod), {"gracePeriodSeconds": 0})


def _is_out_of_service(node: Object) -> bool:
    taints = {one["key"] for one in node["spec"].get("taints", ())}
    return {"node.kubernetes.io/out-of-service", "node.kubernetes.io/unreachable"} <= taints


def _fail(pod: Object, disrupted: bool) -> None:
    pod["status"]["phase"] = "Failed"
    if disrupted:
        words = "PodGC: node is out of service"
        set_condition(pod, "DisruptionTarget", "True", "DeletionByPodGC", words)


def _owners(obj: Object) -> set[str]:
    return {one["uid"] for one in obj["metadata"].get("ownerReferences", ())}


def _blocks(obj: Object, uid: str) -> bool:
    return any(one["uid"] == uid and one.get("blockOwnerDeletion") for one in obj["metadata"]["ownerReferences"])


def _remove(store: Store, obj: Object) -> None:
    found = store.find(*key_of(obj))
    if found is not None and "deletionTimestamp" not in found["metadata"]:
        delete(store, key_of(obj), {"propagationPolicy": "Background"})


def _disown(obj: Object, uid: str) -> None:
    left = [one for one in obj["metadata"].get("ownerReferences", ()) if one["uid"] != uid]
    obj["metadata"].pop("ownerReferences", None)
    if left:
        obj["metadata"]["ownerReferences"] = left


def _drop(obj: Object, finalizer: str) -> None:
    left = [one for one in obj["metadata"].get("finalizers", ()) if one != finalizer]
    obj["metadata"].pop("finalizers", None)
    if left:
        obj["metadata"]["finalizers"] = left
