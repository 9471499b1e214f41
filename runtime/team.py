"""The nodes of a job: which there are, which are missing and to be started again, and which it goes on without. The
coordinator says when; what becomes of a node that can't be had again is the back end's to say.
"""

from __future__ import annotations

import sys
import time

from dtrain.cluster.backends import Backend, Loss
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import Control, read_json, write_once
from dtrain.runtime.background import in_background
from dtrain.runtime.options import Timings
from dtrain.runtime.roster import Roster

_MAX_STARTS = 3  # of one node that never joins


class Team:
    def __init__(self, plan: JobPlan, backend: Backend, control: Control, timings: Timings, roster: Roster) -> None:
        self._plan = plan
        self._backend = backend
        self._control = control
        self._timings = timings
        self._roster = roster
        self._starts: dict[int, int] = {}  # node -> how often it was started again since it was last here
        self._missing_since: dict[int, float] = {}
        left_out = control.left_out()
        self._nodes = [node for node in range(plan.nodes) if node not in left_out]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The nodes of an attempt, in the order of their ranks. Those that the strategy can't use stand by."""
        return tuple(self._nodes[: self._plan.most_nodes(len(self._nodes))])

    @property
    def spare(self) -> int:
        return len(self._nodes) - len(self.ranks)

    @property
    def is_complete(self) -> bool:
        return not self._missing()

    def joined(self, node: int) -> None:
        self._starts.pop(node, None)
        self._missing_since.pop(node, None)

    def due(self, *, first: bool) -> list[int]:
        """Missing nodes that are to be started again now. `first`: there was no attempt yet."""
        return [node for node in self._missing() if self._is_due(node, first)]

    def _missing(self) -> list[int]:
        return [node for node in self._nodes if node not in self._roster.members]

    def _is_due(self, node: int, first: bool) -> bool:
        """At once when its process is known to be dead."""
        since = self._missing_since.setdefault(node, time.monotonic())
        waited = time.monotonic() - since
        record = read_json(self._control.node(node))
        if record is not None and ProcessId.from_json(record).liveness() == "gone":
            return waited > 0.1 * self._starts.get(node, 0)
        known = node in self._starts or record is None or first
        patience_s = self._timings.join_s if known else self._timings.dead_after_s
        return waited > patience_s + (self._timings.setup_s if self._plan.setup else 0.0)

    async def start_again(self, node: int) -> str:
        """Why the node can't be had again; "" where it may still come."""
        self._starts[node] = self._starts.get(node, 0) + 1
        if self.is_exhausted(node):
            return f"node {node} did not join after {_MAX_STARTS} starts; see logs/agent-{node}.log"
        had_come = self._control.node(node).exists()
        started = await in_background(lambda: self._backend.start_node(self._plan, node))
        self._missing_since[node] = time.monotonic()
        if started:
            print(f"node {node} is started again", file=sys.stderr, flush=True)
        # one that never came may only be slow: it is given its time
        return "" if started or not had_come else f"node {node} can't be reached"

    def is_exhausted(self, node: int) -> bool:
        return self._starts.get(node, 0) > _MAX_STARTS

    def wait_for(self, node: int) -> None:
        """As long as it takes: it is its engine's to give."""
        self._starts.pop(node, None)

    async def lose(self, node: int, reason: str, *, alive: bool) -> Loss:
        """What follows from doing without the node."""
        enough = self._plan.most_nodes(len(self._nodes) - 1) > 0
        lose = self._backend.lose_node
        return await in_background(lambda: lose(self._plan, node, reason, enough=enough, alive=alive))

    def drop(self, node: int, reason: str) -> None:
        """Its process; the node's next one is waited for."""
        self._roster.drop(node, reason)

    async def leave_out(self, node: int, reason: str) -> None:
        """For good, as far as this start of the job goes."""
        await in_background(lambda: write_once(self._control.without(node), reason, 0o600))
        self._nodes.remove(node)
        self._roster.drop(node, reason)
