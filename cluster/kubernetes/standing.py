"""What a Job and its pods, as the API shows them, mean for a run: whether it lives, and why it does not run. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dtrain.cluster.kubernetesconfig import AGENT
from dtrain.cluster.procs import Liveness

Object = dict[str, Any]

_INDEX = "batch.kubernetes.io/job-completion-index"
_OVERDUE_S = 15.0  # past the grace of a pod's deletion: its machine would have ended it
_MAX_WORDS = 400
_FINISHED = ("Complete", "Failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was read. `events`: those about what waits, warnings only, oldest first."""

    job: Object | None
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    underway: bool = False  # a launch may still be about to make the Job
    was_there: bool = False  # the Job is known to have been made


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    liveness: Liveness
    words: str = ""


def judge(found: Found) -> Standing:
    living = [pod for pod in found.pods if is_living(pod)]
    if found.job is None:
        if living:
            return Standing(liveness="alive", words="its Job was deleted; its pods are ending")
        if found.underway:
            return Standing(liveness="alive", words="is being submitted")
        return Standing(liveness="gone", words="its Job was deleted" if found.was_there else "")
    if finish := _condition(found.job, *_FINISHED):
        if living:
            return Standing(liveness="alive", words="its pods are ending")
        return Standing(liveness="gone", words=_end_words(finish, found.pods))
    return Standing(liveness="alive", words=waiting_words(found, living))


def is_living(pod: Object) -> bool:
    """Whether a process of it may run, or be started."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def index_of(pod: Object) -> int | None:
    """The node's rank."""
    text = (pod["metadata"].get("annotations") or {}).get(_INDEX, "")
    return int(text) if str(text).isdigit() else None


def is_lost(pod: Object, now: float, *, silent: bool) -> bool:
    """Whether a pod is to go and its machine will never say that it has: the Job waits for it for ever.

    It goes when the machine's kubelet answers, when the Node object is deleted, or by force (kubernetes.io, Force
    Delete StatefulSet Pods). `silent`: its agent is out of reach. One that saves on a machine that is drained is not.
    """
    deletion = pod["metadata"].get("deletionTimestamp")
    if deletion is None or not is_living(pod):
        return False
    overdue = now - seconds(deletion) > _OVERDUE_S  # the time by which it was to be gone
    given_up = _condition(pod, "DisruptionTarget").get("reason") == "DeletionByTaintManager"
    ready = _condition(pod, "Ready", status="")
    return overdue or (silent and given_up and ready.get("status") == "False")


def seconds(timestamp: str) -> float:
    """Of RFC 3339, since the epoch."""
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def waiting_words(found: Found, living: Sequence[Object]) -> str:
    """Why not all of the nodes are at work; "" where they are, or nothing is known yet."""
    assert found.job is not None
    spec = found.job.get("spec", {})
    if spec.get("suspend"):
        return "its Job is suspended: whoever admits jobs here has not admitted it yet"
    waiting = {name: words for pod in living if (words := _pod_words(pod, found.events)) for name in [_name(pod)]}
    if waiting:
        name, words = next(iter(waiting.items()))
        count = f"{len(waiting)} of {spec.get('completions')} pods wait: " if len(waiting) > 1 else ""
        return _short(f"{count}pod {name}: {words}")
    if len(living) < int(spec.get("completions") or 0):
        return _short(_event_words(found.events, _name(found.job)) or _failure_words(found.pods))
    return ""


def _pod_words(pod: Object, events: Sequence[Object]) -> str:
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp") is not None:
        return "is to go, and its machine has not answered yet" if is_living(pod) else ""
    unscheduled = _condition(pod, "PodScheduled", status="False")
    if unscheduled:
        return f"{unscheduled.get('message') or unscheduled.get('reason') or 'waits for a node'}"
    for container in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
        waiting = (container.get("state") or {}).get("waiting")
        if waiting is not None:
            reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
            told = _event_words(events, _name(pod)) if reason in ("ContainerCreating", "PodInitializing", "") else ""
            return ": ".join(filter(None, [reason or "is being started", message or told]))
    return "waits for a node" if status.get("phase") == "Pending" else ""


def _end_words(finish: Object, pods: Sequence[Object]) -> str:
    if finish["type"] == "Complete":
        return "its Job is complete"
    why = finish.get("message") or finish.get("reason") or "no reason is given"
    return _short(_failure_words(pods) or f"its Job has failed: {why}")


def _failure_words(pods: Sequence[Object]) -> str:
    """What the agent of the pod that failed last said at the end."""
    ended = [(_finished_at(state), pod, state) for pod in pods if (state := _terminated(pod)) and state["exitCode"]]
    if not ended:
        return ""
    _, pod, state = max(ended, key=lambda one: one[0])
    said = str(state.get("message") or "").strip().splitlines()
    how = state.get("reason") if state.get("reason") not in (None, "Error") else f"exit code {state['exitCode']}"
    return f"pod {_name(pod)} ended with {how}{': ' + said[-1] if said else ''}"


def silent_failures(pods: Sequence[Object]) -> Iterator[str]:
    """Names of pods that failed and whose status has no word of theirs."""
    ended = ((_name(pod), _terminated(pod)) for pod in pods)
    yield from (name for name, state in ended if state and state["exitCode"] and not state["message"])


def _terminated(pod: Object) -> Object | None:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        state = (container.get("state") or {}).get("terminated")
        if container.get("name") == AGENT and state is not None:
            return {"exitCode": 0, "message": "", **state}
    return None


def _finished_at(state: Object) -> str:
    return str(state.get("finishedAt") or "")


def _event_words(events: Sequence[Object], name: str) -> str:
    messages = [str(event.get("message") or "") for event in events if event["involvedObject"].get("name") == name]
    return messages[-1] if messages else ""


def _condition(of: Object, *types: str, status: str = "True") -> Object:
    """The first condition of one of these types; {} where there is none. `status` "": whatever it says."""
    for condition in of.get("status", {}).get("conditions") or []:
        if condition.get("type") in types and status in ("", condition.get("status")):
            return dict(condition)
    return {}


def _name(of: Object) -> str:
    return str(of["metadata"]["name"])


def _short(*parts: str) -> str:
    text = "; ".join(" ".join(part.split()) for part in parts if part)
    return text if len(text) <= _MAX_WORDS else f"{text[: _MAX_WORDS - 1]}…"
