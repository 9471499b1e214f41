"""The one actor that answers for a job on Ray: it places an actor on each node, tells why the job waits, and clears Ray
of the job when it has ended. Detached and started again by Ray for ever, so it outlives its driver and its node; all
that it knows it finds again in Ray by name and in the run directory. No training decision is made here.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dtrain.cluster import exits
from dtrain.cluster.deaths import count_death
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ray.files import LEAVE_S, RayFiles, Standing
from dtrain.cluster.ray.node import read_plan, why_not
from dtrain.cluster.ray.placing import clear, end_keeper, get_group, nodes_alive, placed, start_nodes
from dtrain.cluster.ray.resources import describe, fits
from dtrain.cluster.rundir import put_end, read_json

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_POLL_S = 0.25
_LOOK_S = 1.0  # between two questions to Ray about a job that runs
_REPLACE_S = 30.0  # for Ray to fill a lost node's place, where one is there that could
_KILLED_S = 3.0  # for killed agents to be gone, and with them what a node's setup lines have started
_DRIVER_S = 10.0  # for the driver to have made what it makes
_USELESS_S = 60.0  # that a keeper which can't keep stays, to say why


class KeeperActor:
    """Given to ray.remote by cluster/ray/driver.py."""

    def __init__(self, run_dir: str, job_id: str, key: str) -> None:
        self._problem = why_not(run_dir, job_id)
        self._is_asked = threading.Event()
        work: Callable[[], None] = partial(_leave, job_id)
        if not self._problem:
            work = _Keeper(read_plan(run_dir, job_id), key, self._is_asked).keep
        threading.Thread(target=work, daemon=True).start()

    def problem(self) -> str:
        """Why this can't keep the job; "" where it does. The driver asks when it has made what it makes."""
        self._is_asked.set()
        return self._problem


class _Keeper:
    def __init__(self, plan: JobPlan, key: str, is_asked: threading.Event) -> None:
        self._plan = plan
        self._key = key
        self._files = RayFiles(plan)
        self._is_asked = is_asked
        self._began = time.monotonic()
        self._lost_since: dict[int, float] = {}
        self._checks: list[Any] = []  # what the node actors will say of themselves

    def keep(self) -> None:
        """To the end of the job, and of this process. What fails is tried again in another one, which Ray starts."""
        try:
            if not self._files.is_over():
                self._see_it_through()
            self._clear()
        except Exception as error:
            traceback.print_exc()
            if count_death(self._files.control, "ray-keeper") > self._plan.max_restarts_without_progress:
                self._end(exits.FAILED, f"Ray: {error}")
            time.sleep(_LOOK_S)
            os._exit(1)

    def _see_it_through(self) -> None:
        try:
            group = get_group(self._plan)
        except (ValueError, TypeError) as error:  # such a request Ray will never take
            self._end(exits.NEVER_RETRY, f"Ray: {error}")
            return
        had_nodes = self._files.bundles() is not None  # this may be a keeper's second life, while a node is lost
        if had_nodes or self._await_nodes(group):
            actors = start_nodes(self._plan, self._files, group, self._key)
            self._checks = [actor.problem.remote() for actor in actors]
            self._watch(group)

    def _await_nodes(self, group: PlacementGroup) -> bool:
        """Whether the job has got its nodes; False where it is over before that."""
        while not group.wait(_POLL_S):
            if self._files.control.stop(0).exists():
                cancelled = self._files.control.cancel.exists()
                self._end(exits.CANCELLED if cancelled else exits.STOPPED, "before it began")
            if self._files.is_over():
                return False
            self._files.put_standing(Standing(phase="waiting", words=self._waiting_words()))
        return not self._files.is_over()

    def _waiting_words(self) -> str:
        fitting = sum(fits(self._plan, node["Resources"], node["Labels"]) for node in nodes_alive())
        asked = f"waiting for {describe(self._plan)}"
        return f"{asked}; the cluster has {fitting}" + ("" if fitting < self._plan.nodes else ", not all of them free")

    def _watch(self, group: PlacementGroup) -> None:
        while not self._files.is_over():
            self._hear_checks()
            self._look_for_ended_nodes()
            self._files.put_standing(Standing(phase="running", lost=self._lost(group)))
            until = time.monotonic() + _LOOK_S
            while time.monotonic() < until and not self._files.is_over():
                time.sleep(_POLL_S)

    def _hear_checks(self) -> None:
        """Ends the job where a node can't take part, and never will."""
        import ray

        if not self._checks:
            return
        heard, self._checks = ray.wait(self._checks, num_returns=len(self._checks), timeout=0)
        for answer in heard:
            with contextlib.suppress(ray.exceptions.RayError):  # lost with its node, which another will replace
                if problem := ray.get(answer):
                    self._end(exits.NEVER_RETRY, problem)

    def _look_for_ended_nodes(self) -> None:
        """Nobody else would notice that no node starts an agent any more."""
        left = self._files.control.left_out()
        ranks = [rank for rank in range(self._plan.nodes) if rank not in left]
        marks = [self._files.gave_up(rank) for rank in ranks]
        if all(mark.exists() for mark in marks):
            self._end(exits.FAILED, f"no node could keep an agent: {marks[0].read_text() if marks else ''}")

    def _lost(self, group: PlacementGroup) -> dict[str, str]:
        """Node rank -> why its place can't be filled, and only where that is known."""
        alive = {node["NodeID"]: node for node in nodes_alive()}
        bundles, nodes = self._files.bundles() or [], self._files.nodes()
        found = {index: node for index, node in placed(group).items() if node.id in alive}
        now = {rank: found[index] for rank, index in enumerate(bundles) if index in found}
        if any(nodes.get(rank) != node for rank, node in now.items()):
            self._files.put_nodes(bundles, {**nodes, **now})
        used = {node.id for node in now.values()}
        others = [node for identity, node in alive.items() if identity not in used]
        candidates = [node for node in others if fits(self._plan, node["Resources"], node["Labels"])]
        lost = {}
        for rank in set(range(self._plan.nodes)) - now.keys():
            since = self._lost_since.setdefault(rank, time.monotonic())
            if not candidates:
                lost[str(rank)] = f"Ray has no other node with {describe(self._plan, number=False)}"
            elif time.monotonic() - since > _REPLACE_S:
                lost[str(rank)] = "the nodes that Ray could put in its place are taken"
        self._lost_since = {rank: since for rank, since in self._lost_since.items() if rank not in now}
        return lost

    def _clear(self) -> None:
        """Leaves nothing of the job in Ray, this actor included. What a driver is still making is waited for."""
        self._is_asked.wait(max(0.0, self._began + _DRIVER_S - time.monotonic()))
        clear(self._plan, self._files, _KILLED_S if self._files.killed.exists() else LEAVE_S)
        self._files.put_standing(Standing(phase="over"))
        end_keeper(self._plan.job_id)

    def _end(self, code: int, reason: str) -> None:
        state = {exits.CANCELLED: "cancelled", exits.STOPPED: "stopped"}.get(code, "failed")
        step = int((read_json(self._files.control.status) or {}).get("step") or 0)
        put_end(self._files.run, self._files.control, state=state, exit_code=code, reason=reason, step=step)


def _leave(job_id: str) -> None:
    """The driver ends a keeper that is of no use. This is for one that has lost its driver."""
    time.sleep(_USELESS_S)
    end_keeper(job_id)
