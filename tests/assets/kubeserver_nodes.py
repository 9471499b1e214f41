"""Nodes of the tests' Kubernetes as the control plane sees them: the scheduler, and what is done with pods of a node
that says nothing any more. What runs on them is kubeserver_kubelet.py's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

from kubeserver_admission import pod_amounts
from kubeserver_conditions import evict, set_condition
from kubeserver_events import Events
from kubeserver_podrules import quantity
from kubeserver_store import Object, Store, key_of, now, seconds_since

UNREACHABLE = "node.kubernetes.io/unreachable"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"


def node(name: str, address: str, capacity: dict[str, str], labels: dict[str, str]) -> Object:
    own = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    conditions = [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastTransitionTime": now()}]
    return {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {**own, **labels}}, "spec": {},
        "status": {
            "capacity": capacity, "allocatable": capacity, "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
        },
    }  # fmt: skip


def tolerates(pod: Object, taint: Object) -> Object | None:
    """The toleration that fits. https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/: "A
    toleration "matches" a taint if the keys are the same and the effects are the same", and the operator Exists or the
    values equal; an empty key "matches all keys", an empty effect "matches all effects"."""
    for one in pod["spec"].get("tolerations", ()):
        if one.get("key", "") not in ("", taint["key"]) or one.get("effect", "") not in ("", taint["effect"]):
            continue
        if one.get("operator", "Equal") == "Exists" or one.get("value", "") == taint.get("value", ""):
            found: Object = one
            return found
    return None


@dataclass(frozen=True, slots=True)
class Scheduler:
    store: Store
    events: Events

    def sync(self) -> None:
        """Every pod that waits, once, under the store's lock."""
        pods = self.store.objects("pods")
        for pod in pods:
            waits = "nodeName" not in pod["spec"] and "deletionTimestamp" not in pod["metadata"]
            if waits and not pod["spec"].get("schedulingGates"):
                self._place(pod)

    def _place(self, pod: Object) -> None:
        why = self._claims(pod)
        fitting: list[tuple[int, str]] = []
        reasons: list[str] = []
        nodes = self.store.objects("nodes")
        if not why:
            others = [one for one in self.store.objects("pods") if "nodeName" in one["spec"]]
            for one in nodes:
                found = [*_obstacles(pod, one, others)]
                reasons += found[:1] if found and not found[0].startswith("Insufficient") else found
                if not found:
                    here = sum(other["spec"]["nodeName"] == one["metadata"]["name"] for other in others)
                    fitting.append((here, one["metadata"]["name"]))
            words = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
            why = f"0/{len(nodes)} nodes are available: {words}."
        if not fitting:
            self._cannot(pod, why)
            return
        name = min(fitting)[1]

        def bind(one: Object) -> None:
            one["spec"]["nodeName"] = name
            set_condition(one, "PodScheduled", "True")

        self.store.edit(key_of(pod), bind)
        full = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        self.events.tell(pod, "Normal", "Scheduled", f"Successfully assigned {full} to {name}", "default-scheduler")

    def _cannot(self, pod: Object, why: str) -> None:
        """https://kubernetes.io/docs/concepts/configuration/manage-resources-containers/#my-pods-are-pending-with-event-message-failedscheduling:
        "Warning  FailedScheduling [...] 0/23 nodes available: insufficient cpu"."""
        known = pod["status"].get("conditions", ())
        if any(c["type"] == "PodScheduled" and c.get("message") == why for c in known):
            return
        self.store.edit(key_of(pod), lambda one: set_condition(one, "PodScheduled", "False", "Unschedulable", why))
        self.events.tell(pod, "Warning", "FailedScheduling", why, "default-scheduler")

    def _claims(self, pod: Object) -> str:
        number = len(self.store.objects("nodes"))
        for volume in pod["spec"].get("volumes", ()):
            name = volume.get("persistentVolumeClaim", {}).get("claimName")
            if name is None:
                continue
            claim = self.store.find("persistentvolumeclaims", pod["metadata"]["namespace"], name)
            if claim is None:
                return f'persistentvolumeclaim "{name}" not found'
            if claim["status"]["phase"] != "Bound":
                return f"0/{number} nodes are available: pod has unbound immediate PersistentVolumeClaims."
        return ""


def _obstacles(pod: Object, one: Object, others: list[Object]) -> Iterator[str]:
    """Why the pod can't go to a node, in the scheduler's words."""
    for taint in one["spec"].get("taints", ()):
        if taint["effect"] in ("NoSchedule", "NoExecute") and not tolerates(pod, taint):
            if taint["key"] == UNSCHEDULABLE:
                yield "node(s) were unschedulable"
            else:
                yield f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
            return
    if not _selected(pod, one):
        yield "node(s) didn't match Pod's node affinity/selector"
        return
    if _repelled(pod, one, others):
        yield "node(s) didn't match pod anti-affinity rules"
        return
    free = {name: quantity(text) or Decimal(0) for name, text in one["status"]["allocatable"].items()}
    for other in others:
        if other["spec"]["nodeName"] == one["metadata"]["name"] and other["status"].get("phase") not in (
            "Succeeded",
            "Failed",
        ):
            for name, amount in pod_amounts(other["spec"]).items():
                free[name] = free.get(name, Decimal(0)) - amount
    for name, amount in pod_amounts(pod["spec"]).items():
        if amount > free.get(name, Decimal(0)):
            yield f"Insufficient {name}"


def _selected(pod: Object, one: Object) -> bool:
    labels = one["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in pod["spec"].get("nodeSelector", {}).items()):
        return False
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
    return not terms or any(all(_expressed(labels, e) for e in term.get("matchExpressions", ())) for term in terms)


def _expressed(labels: dict[str, str], expression: Object) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/#operators: with Gt "the field value will
    be parsed as an integer, and that integer is less than the integer that results from parsing the value of a label
    named by this selector"; Gt and Lt are for nodes alone and "will not work with non-integer values"."""
    value, values = labels.get(expression["key"]), expression.get("values", ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    try:
        here, asked = int(value or ""), int(values[0])
    except ValueError:
        return False
    return here > asked if expression["operator"] == "Gt" else here < asked


def _repelled(pod: Object, one: Object, others: list[Object]) -> bool:
    """Required anti-affinity, by host name or another label of nodes of which each has its own value."""
    anti = pod["spec"].get("affinity", {}).get("podAntiAffinity", {})
    for term in anti.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
        selector = term.get("labelSelector", {})
        for other in others:
            labels = other["metadata"].get("labels", {})
            same = other["spec"]["nodeName"] == one["metadata"]["name"] and other["status"].get("phase") not in (
                "Succeeded",
                "Failed",
            )
            if (
                same
                and all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
                and all(_expressed(labels, e) for e in selector.get("matchExpressions", ()))
            ):
                return True
    return False


@dataclass(slots=True)
class NodeLifecycle:
    """`grace_s`: from a node's last word to the taint; 50 s in the real one (node-monitor-grace-period).
    `toleration_scale`: by which tolerationSeconds are shortened.

    https://kubernetes.io/docs/concepts/architecture/nodes/#node-controller: "In the case that a node becomes
    unreachable, [it updates] the Ready condition in the Node's .status field [...] to Unknown", and then triggers
    "API-initiated eviction for all of the Pods on the unreachable node".
    """

    store: Store
    events: Events
    grace_s: float = 50.0
    toleration_scale: float = 1.0
    _silent: dict[str, float] = field(default_factory=dict)

    def silence(self, name: str) -> None:
        self._silent.setdefault(name, time.monotonic())

    def hear(self, name: str) -> None:
        """The node reports again."""
        with self.store.changed:
            self._silent.pop(name, None)
            self.store.edit(("nodes", "", name), _ready)

    def sync(self) -> None:
        for name, since in list(self._silent.items()):
            if time.monotonic() - since >= self.grace_s:
                self.store.edit(("nodes", "", name), _unreachable)
                self._mark_pods(name)
        for one in self.store.objects("nodes"):
            for taint in one["spec"].get("taints", ()):
                if taint["effect"] == "NoExecute":
                    self._evict(one["metadata"]["name"], taint)

    def _mark_pods(self, name: str) -> None:
        """Their phase stays: "the control plane [...] enforces a policy for setting the phase of all Pods on the lost
        node" only by deleting them."""
        for pod in self.store.objects("pods"):
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))
            if pod["spec"].get("nodeName") == name and ready:
                self.store.edit(key_of(pod), lambda one: set_condition(one, "Ready", "False", "NodeNotReady"))

    def _evict(self, name: str, taint: Object) -> None:
        """ "If this condition persists [...] tolerationSeconds dictates how long the pod stays bound to a node that has
        a taint"; no toleration: at once; one without seconds: for ever."""
        for pod in self.store.objects("pods"):
            if pod["spec"].get("nodeName") != name or "deletionTimestamp" in pod["metadata"]:
                continue
            if pod["status"].get("phase") in ("Succeeded", "Failed"):
                continue
            toleration = tolerates(pod, taint)
            if toleration is not None:
                stays_s = toleration.get("tolerationSeconds")
                if stays_s is None or seconds_since(taint["timeAdded"]) < stays_s * self.toleration_scale:
                    continue
            words = "Taint manager: deleting due to NoExecute taint"
            self.events.tell(
                pod,
                "Normal",
                "TaintManagerEviction",
                f"Marking for deletion Pod {pod['metadata']['name']}",
                "taint-eviction-controller",
            )
            evict(self.store, pod, "DeletionByTaintManager", words, {})


def _ready(one: Object) -> None:
    set_condition(one, "Ready", "True", "KubeletReady", "kubelet is posting ready status")
    left = [
        t for t in one["spec"].get("taints", ()) if t["key"] not in (UNREACHABLE, "node.kubernetes.io/out-of-service")
    ]
    one["spec"].pop("taints", None)
    if left:
        one["spec"]["taints"] = left


def _unreachable(one: Object) -> None:
    set_condition(one, "Ready", "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
    taints = one["spec"].setdefault("taints", [])
    for effect in ("NoSchedule", "NoExecute"):
        if not any((t["key"], t["effect"]) == (UNREACHABLE, effect) for t in taints):
            taints.append({"key": UNREACHABLE, "effect": effect, "timeAdded": now()})
