"""The objects of the tests' Kubernetes: kept in memory, every write numbered, with the history that watches read.

What is known of a kind stands in RESOURCES. Rules (what may be written) and behaviour (what follows from it) are other
files' business: kubeserver_rules.py, kubeserver_rest.py and the controllers.
"""

from __future__ import annotations

import datetime
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace ("" for what has none), name

READ = ("get", "list", "watch")
WRITE = ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    plural: str
    kind: str
    group: str = ""  # "": the core group, /api/v1
    namespaced: bool = True
    verbs: tuple[str, ...] = READ + WRITE
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def qualified(self) -> str:
        """As the server's messages name it: `pods`, `jobs.batch`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


RESOURCES = {
    resource.plural: resource
    for resource in (
        Resource(plural="pods", kind="Pod", subresources=("status", "log", "eviction")),
        Resource(plural="services", kind="Service", subresources=("status",)),
        Resource(plural="secrets", kind="Secret"),
        Resource(plural="configmaps", kind="ConfigMap"),
        Resource(plural="events", kind="Event"),
        Resource(plural="resourcequotas", kind="ResourceQuota", subresources=("status",)),
        Resource(plural="serviceaccounts", kind="ServiceAccount"),
        Resource(plural="persistentvolumeclaims", kind="PersistentVolumeClaim", subresources=("status",)),
        Resource(plural="persistentvolumes", kind="PersistentVolume", namespaced=False),
        Resource(plural="nodes", kind="Node", namespaced=False, subresources=("status",)),
        Resource(plural="namespaces", kind="Namespace", namespaced=False, subresources=("status",)),
        Resource(plural="jobs", kind="Job", group="batch", subresources=("status",)),
        Resource(
            plural="selfsubjectaccessreviews", kind="SelfSubjectAccessReview", group="authorization.k8s.io",
            namespaced=False, verbs=("create",),
        ),
    )
}  # fmt: skip


class Refused(Exception):
    """An answer that is no success. `body`: the Status object.

    https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/: "Status is a return value for calls
    that don't return other objects."
    """

    def __init__(
        self, code: int, reason: str, message: str, *, details: Object | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.body: Object = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code,
        }  # fmt: skip
        if retry_after_s is not None:
            details = {**(details or {}), "retryAfterSeconds": retry_after_s}
        if details is not None:
            self.body["details"] = details


def not_found(resource: Resource, name: str) -> Refused:
    details = {"name": name, "kind": resource.plural, **({"group": resource.group} if resource.group else {})}
    return Refused(404, "NotFound", f'{resource.qualified} "{name}" not found', details=details)


def conflict(resource: Resource, name: str, why: str) -> Refused:
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return Refused(409, "Conflict", message, details={"name": name, "kind": resource.plural})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    version: int
    type: str  # ADDED, MODIFIED, DELETED
    key: Key
    object: Object  # never changed in place
    before: Object | None


def copied(value: Any) -> Any:
    """JSON's kinds of values only, five times as fast as copy.deepcopy."""
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def now() -> str:
    """RFC 3339 in whole seconds, as metav1.Time."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_since(stamp: str) -> float:
    then = datetime.datetime.fromisoformat(stamp)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def key_of(obj: Object) -> Key:
    plural = next(one.plural for one in RESOURCES.values() if one.kind == obj["kind"])
    return plural, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


@dataclass(slots=True)
class Store:
    """Every method may be called from any thread; what comes out is a copy, what goes in is copied.

    `changed` is notified after each write and is the lock of all.
    """

    history_size: int = 2000
    changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    version: int = 100
    _objects: dict[Key, Object] = field(default_factory=dict)
    _history: deque[Change] = field(default_factory=deque)
    oldest: int = 100  # changes after this one are known

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        with self.changed:
            found: Object | None = copied(self._objects.get((plural, namespace, name)))
            return found

    def get(self, plural: str, namespace: str, name: str) -> Object:
        """Raises Refused 404."""
        found = self.find(plural, namespace, name)
        if found is None:
            raise not_found(RESOURCES[plural], name)
        return found

    def objects(self, plural: str, namespace: str | None = None) -> list[Object]:
        """In the order of namespaces and names, as etcd's keys are."""
        with self.changed:
            keys = sorted(k for k in self._objects if k[0] == plural and namespace in (None, k[1]))
            return [copied(self._objects[key]) for key in keys]

    def create(self, obj: Object) -> Object:
        """Gives uid, time and version. Raises Refused 409."""
        with self.changed:
            obj = copied(obj)
            metadata = obj["metadata"]
            if not metadata.get("name"):
                metadata["name"] = self._generated(obj)
            key = key_of(obj)
            if key in self._objects:
                resource = RESOURCES[key[0]]
                message = f'{resource.qualified} "{key[2]}" already exists'
                raise Refused(409, "AlreadyExists", message, details={"name": key[2], "kind": resource.plural})
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata["creationTimestamp"] = now()
            return self._write("ADDED", key, obj, None)

    def replace(self, obj: Object) -> Object:
        """Writes over what is there; nothing is written where nothing differs. Raises Refused: 404; 409 where
        metadata.resourceVersion is given and is not the present one.

        https://kubernetes.io/docs/reference/using-api/api-concepts/: "the API server [...] rejects the request with a
        409 Conflict status code" where the resourceVersion is stale.
        """
        with self.changed:
            key = key_of(obj)
            old = self._objects.get(key)
            resource = RESOURCES[key[0]]
            if old is None:
                raise not_found(resource, key[2])
            obj = copied(obj)
            given = obj["metadata"].get("resourceVersion")
            if given and given != old["metadata"]["resourceVersion"]:
                why = "the object has been modified; please apply your changes to the latest version and try again"
                raise conflict(resource, key[2], why)
            obj["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
            if obj == old:
                return obj
            if obj["metadata"].get("deletionTimestamp") and _is_free(obj):
                return self._remove(key, obj)
            return self._write("MODIFIED", key, obj, old)

    def edit(self, key: Key, change: Callable[[Object], object]) -> Object | None:
        """A controller's own change of what is there now. None: it is gone."""
        with self.changed:
            obj = self.find(*key)
            if obj is None:
                return None
            change(obj)
            return self.replace(obj)

    def remove(self, key: Key) -> Object | None:
        with self.changed:
            old = self._objects.get(key)
            return self._remove(key, copied(old)) if old is not None else None

    def since(self, version: int) -> list[Change]:
        with self.changed:
            return [change for change in self._history if change.version > version]

    def forget_history(self) -> None:
        """As after five minutes: who asks for changes since then is answered 410."""
        with self.changed:
            self._history.clear()
            self.oldest = self.version + 1
            self.version += 1

    def _remove(self, key: Key, obj: Object) -> Object:
        old = self._objects.pop(key)
        return self._write("DELETED", key, obj, old)

    def _write(self, kind: str, key: Key, obj: Object, old: Object | None) -> Object:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        if kind != "DELETED":
            if old is None or obj.get("spec") != old.get("spec"):
                self._count_generation(obj, old)
            self._objects[key] = obj
        self._history.append(Change(version=self.version, type=kind, key=key, object=obj, before=old))
        while len(self._history) > self.history_size:
            self.oldest = self._history.popleft().version
        self.changed.notify_all()
        told: Object = copied(obj)
        return told

    def _count_generation(self, obj: Object, old: Object | None) -> None:
        if "spec" in obj:
            obj["metadata"]["generation"] = (old or {"metadata": {}})["metadata"].get("generation", 0) + 1

    def _generated(self, obj: Object) -> str:
        """https://kubernetes.io/docs/reference/using-api/api-concepts/: "Kubernetes combines the name you supplied with
        a random value"; letters and digits that make no words, the name shortened to 63 in all."""
        base = str(obj["metadata"]["generateName"])[:58]
        return base + "".join(random.choices(_SUFFIX, k=5))


_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"


def _is_free(obj: Object) -> bool:
    """Whether nothing keeps an object that is being deleted.

    https://kubernetes.io/docs/concepts/overview/working-with-objects/finalizers/: "When the metadata.finalizers field
    is empty, Kubernetes considers the deletion complete and deletes the resource." A Pod also has its grace period.
    """
    metadata = obj["metadata"]
    return not metadata.get("finalizers") and not metadata.get("deletionGracePeriodSeconds")


def delete(store: Store, key: Key, options: Object) -> Object:
    """What DELETE does to one object. Returns it as it is then. Raises Refused: 404; 409 for preconditions that do not
    hold.

    Dependents are the garbage collector's (kubeserver_owners.py), which finds what the finalizers here tell it.
    """
    with store.changed:
        resource = RESOURCES[key[0]]
        obj = store.get(*key)
        metadata = obj["metadata"]
        for name, wanted in (options.get("preconditions") or {}).items():
            if wanted is not None and wanted != metadata.get(name):
                label = {"uid": "UID", "resourceVersion": "ResourceVersion"}[name]
                why = (
                    f"Precondition failed: {label} in precondition: {wanted}, {label} in object meta: {metadata[name]}"
                )
                raise conflict(resource, key[2], why)
        grace = _grace(obj, options.get("gracePeriodSeconds"))
        finalizers = [*metadata.get("finalizers", ())]
        # https://kubernetes.io/docs/concepts/architecture/garbage-collection/: in foreground deletion the owner "enters
        # a deletion in progress state" and keeps the finalizer foregroundDeletion until its dependents are gone.
        if not metadata.get("deletionTimestamp"):
            finalizers += _propagation(resource, options)
        elif grace and metadata.get("deletionGracePeriodSeconds", 0) <= grace:
            return obj  # "a second delete may only shorten it"
        metadata["finalizers"] = finalizers
        if not finalizers:
            del metadata["finalizers"]
        metadata.setdefault("deletionTimestamp", now())
        metadata["deletionGracePeriodSeconds"] = grace
        metadata.pop("resourceVersion")
        return store.replace(obj)


def _grace(obj: Object, asked: int | None) -> int:
    """https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination: "The default grace period is
    30 seconds"; only Pods have one, and only those that a node may be running."""
    if obj["kind"] != "Pod" or not obj["spec"].get("nodeName"):
        return 0
    if obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    return int(asked if asked is not None else obj["spec"].get("terminationGracePeriodSeconds", 30))


def _propagation(resource: Resource, options: Object) -> list[str]:
    policy = options.get("propagationPolicy")
    if policy is None and options.get("orphanDependents") is not None:
        policy = "Orphan" if options["orphanDependents"] else "Background"
    if policy is None:
        # https://kubernetes.io/docs/concepts/workloads/controllers/job/#ttl-mechanism-for-finished-jobs: Jobs "have a
        # default deletion policy of orphanDependents causing Pods created by an unmanaged Job to be left around".
        policy = "Orphan" if resource.plural == "jobs" else "Background"
    return {"Orphan": ["orphan"], "Foreground": ["foregroundDeletion"], "Background": []}[policy]
