"""Back end `kubernetes`: one Job whose pods are the nodes. The Job replaces pods, the agents replace workers; here the
two are asked, told to stop, and helped where one waits for a machine that is lost.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.cluster.answers import LastAnswers
from dtrain.cluster.backends import Loss, too_few
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.interfaces import Interface, facing
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes import submission
from dtrain.cluster.kubernetes.client import (
    Client,
    KubernetesRefused,
    KubernetesUnreachable,
    Object,
    connect,
    find_place,
    in_pod,
    is_installed,
)
from dtrain.cluster.kubernetes.entry import pod_script, script_path
from dtrain.cluster.kubernetes.manifest import to_yaml
from dtrain.cluster.kubernetes.names import JOB_ID, object_name
from dtrain.cluster.kubernetes.render import POD_IP, render_job, render_service
from dtrain.cluster.kubernetes.standing import Found, Standing, index_of, is_living, is_lost, judge, silent_failures
from dtrain.cluster.kubernetes.trial import refusal
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import Control, RunDir, read_json, remove, tells_of_life, write_atomic, write_once
from dtrain.cluster.zygote import Zygote

_MISSING_S = 5.0  # between two looks while nodes are missing: one may wait for us, see `_settle`
_KILL_S = 5.0  # for killed pods to be gone, before their machines are not waited for any more
_REPLACED_S = 300.0  # for a pod in a lost one's place: a dead machine is noticed after a minute
_POLL_S = 0.2
_LOG_LINES = 3

# What tells a process that it is in a pod: a worker has no business with the API.
_PODS_OWN = ("KUBERNETES_", "JOB_COMPLETION_INDEX", POD_IP)

_asked: LastAnswers[Standing] = LastAnswers()


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesBackend:
    agent_args: tuple[str, ...] = ()

    @property
    def detaches(self) -> bool:
        return True

    def render(self, plan: JobPlan) -> str:
        """For `kubectl create -f -`, if the run directory were there; the pods' script stands behind it."""
        objects = (render_job(plan), render_service(plan))
        script = f"{script_path(plan)}, which each pod runs:\n{pod_script(plan, self.agent_args)}"
        comment = "".join(f"# {line}".rstrip() + "\n" for line in script.splitlines())
        return "---\n".join(map(to_yaml, objects)) + comment

    def check(self, plan: JobPlan) -> None:
        """Asks the cluster what it would say to the Job, its pods and the Service: rights, admission, every field."""
        try:
            if words := refusal(plan, self._client(plan)):
                raise UsageError(f"Kubernetes would refuse the job: {words}")
        except KubernetesUnreachable as error:
            raise UsageError(f"{error}. Nothing was submitted; try again later.") from error

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        (RunDir(plan.run_dir).path / "logs").mkdir(parents=True, exist_ok=True)
        write_atomic(_control(plan).script, pod_script(plan, self.agent_args), 0o600)
        place = find_place(plan.kubernetes.context, plan.kubernetes.namespace)
        submission.submit(plan, connect(place), place)

    def _client(self, plan: JobPlan) -> Client:
        """To the cluster that has the job, or is to have it; a pod asks its own. Raises UsageError."""
        place = submission.place_of(plan) or find_place(plan.kubernetes.context, plan.kubernetes.namespace)
        return connect(replace(place, context="") if in_pod() else place)

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        """From the run directory as long as that tells of all nodes at work; else the cluster is asked."""
        control = _control(plan)
        status = read_json(control.status) or {}
        fresh = tells_of_life(control) and not control.ended.exists()
        if fresh and _all_work(plan, status):
            return "alive"
        standing = _asked.ask(plan.job_id, min(max_age_s, _MISSING_S) if fresh else max_age_s, lambda: self._ask(plan))
        return "alive" if fresh and standing.liveness == "unknown" else standing.liveness

    def reason(self, plan: JobPlan) -> str:
        standing = _asked.get(plan.job_id)
        return "" if standing is None else standing.words

    def _ask(self, plan: JobPlan) -> Standing:
        """What the cluster says; what a launch or a machine that died has left undone is done on the way."""
        if not _control(plan).path.exists():
            return Standing(liveness="gone")
        if submission.place_of(plan) is None:
            if submission.is_underway(plan):
                return Standing(liveness="alive", words="is being submitted")
            submission.abandon(plan)
            return Standing(liveness="gone", words=submission.NEVER)
        try:
            client = self._client(plan).for_looks()
            found = _look(plan, client)
            self._settle(plan, client, found)
            standing = judge(found)
            return replace(standing, words=_with_log(client, found, standing))
        except (KubernetesUnreachable, KubernetesRefused, UsageError) as error:
            return Standing(liveness="unknown", words=str(error))

    def _settle(self, plan: JobPlan, client: Client, found: Found) -> None:
        if found.job is None:
            if not (found.was_there or found.underway or any(map(is_living, found.pods))):
                submission.abandon(plan)
            return
        with contextlib.suppress(KubernetesRefused):  # who may only look, looks
            if found.job["metadata"].get("deletionTimestamp") is None and not submission.is_complete(plan, client):
                submission.complete(plan, client, found.job)
            for pod in _lost(plan, found.pods):
                client.remove_pod(pod)

    def called(self, plan: JobPlan) -> str:
        place = submission.place_of(plan)
        return f"Kubernetes Job {place.namespace}/{object_name(plan)}" if place and place.namespace else ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return True

    def hasten(self, plan: JobPlan) -> None:
        """`state` does what can be done."""

    def stop(self, plan: JobPlan) -> None:
        """The coordinator finds the file. Where there is none, nothing was begun that could be saved: the Job goes, and
        what its pods are doing has the grace to end."""
        control = _control(plan)
        start = int(control.incarnation.read_text()) if control.incarnation.exists() else 0
        write_once(control.stop(start), "asked for by a person", 0o600)
        if not tells_of_life(control) or control.ended.exists():
            self._client(plan).delete_job(object_name(plan))

    def kill(self, plan: JobPlan) -> None:
        if submission.place_of(plan) is None:
            return
        client = self._client(plan)
        client.delete_job(object_name(plan))
        deadline = time.monotonic() + _KILL_S
        while left := [pod for pod in client.pods(_selector(plan)) if is_living(pod)]:
            if time.monotonic() > deadline + _KILL_S:
                names = ", ".join(str(pod["metadata"]["name"]) for pod in left)
                raise KubernetesUnreachable(f"pods that were killed are still there: {names}. Look at their nodes.")
            for pod in left:
                if time.monotonic() > deadline:
                    client.remove_pod(pod)
                elif (pod["metadata"].get("deletionGracePeriodSeconds") or 1e9) > 1:
                    client.delete_pod(pod, grace_s=1)
            time.sleep(_POLL_S)
        remove(_control(plan).status)  # it tells of life

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        """The Job does it; a pod whose service account may, takes away what the Job waits for."""
        if in_pod() and is_installed():
            with contextlib.suppress(DtrainError):
                client = self._client(plan)
                for pod in client.pods(_selector(plan)):
                    if index_of(pod) == node_rank and is_lost(pod, time.time(), silent=True):
                        client.remove_pod(pod)
        return False

    def clear(self, plan: JobPlan) -> None:
        """A pod that is cut off and wakes up later finds that it is not the node any more."""

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """One that never came waits for its place, and so does the run; after that it goes on without those that do not
        come back, if it can, until it is started anew."""
        control = _control(plan)
        if not alive and (not control.node(node_rank).exists() or _awaited_s(control, node_rank) < _REPLACED_S):
            return Loss(follows="wait")
        if enough:
            return Loss(follows="rest")
        return Loss(follows="nothing" if alive else "wait", note=too_few(plan))

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in environ.items() if not name.startswith(_PODS_OWN)}

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        """That of the pod's own address, which every other pod reaches: no name has to be known anywhere yet."""
        return facing(plan.interface, [os.environ.get(POD_IP, "")], [])


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _selector(plan: JobPlan) -> str:
    return f"{JOB_ID}={plan.job_id}"


def _awaited_s(control: Control, node_rank: int) -> float:
    """For how long another process has been waited for in the place of the one that was the node last."""
    mark = control.path / f"awaited-{node_rank}"
    last = control.node(node_rank).read_text()
    if not mark.exists() or mark.read_text() != last:
        write_atomic(mark, last, 0o600)
    return time.time() - mark.stat().st_mtime


def _all_work(plan: JobPlan, status: Mapping[str, object]) -> bool:
    left_out = RunDir(plan.run_dir).control(plan.job_id).left_out()
    return status.get("state") in ("running", "stopping") and _heard_of(status) | set(left_out) >= set(
        range(plan.nodes)
    )


def _heard_of(status: Mapping[str, object]) -> frozenset[int]:
    """The nodes whose workers the coordinator tells of."""
    workers = status.get("workers")
    return frozenset(int(worker["node"]) for worker in workers) if isinstance(workers, list) else frozenset()


def _look(plan: JobPlan, client: Client) -> Found:
    name = object_name(plan)
    job = client.job(name)
    pods = client.pods(_selector(plan))
    waits = [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Pending"]
    about = [*([name] if len(pods) < plan.nodes and job is not None else []), *waits[:1]]
    events: list[Object] = []
    with contextlib.suppress(KubernetesRefused):  # without the right to read events there are fewer words
        events = [event for one in about for event in client.events(one) if event.get("type") == "Warning"]
    was_there = submission.was_there(plan)
    underway = not was_there and submission.is_underway(plan)
    return Found(job=job, pods=pods, events=events, underway=underway, was_there=was_there)


def _lost(plan: JobPlan, pods: Sequence[Object]) -> list[Object]:
    """Pods that the Job waits for in vain. Whether a node is out of reach tells the coordinator's status."""
    control = _control(plan)
    status = read_json(control.status) or {}
    told = tells_of_life(control)
    heard_of = _heard_of(status)
    return [pod for pod in pods if is_lost(pod, time.time(), silent=told and index_of(pod) not in heard_of)]


def _with_log(client: Client, found: Found, standing: Standing) -> str:
    """The words, and the last lines of a pod that has failed without a word in its status or the run directory."""
    if standing.liveness != "gone" or (name := next(silent_failures(found.pods), None)) is None:
        return standing.words
    with contextlib.suppress(KubernetesRefused, KubernetesUnreachable):
        said = " | ".join(client.log(name, _LOG_LINES).split("\n")).strip(" |")
        return f"{standing.words}; it said last: {said}" if said else standing.words
    return standing.words
