"""control/<job_id>/status.json: the coordinator's newest view of the job, the object of `dtrain status --json`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import Control, RunDir, read_json, write_atomic
from dtrain.runtime.background import in_background
from dtrain.runtime.checkpoint.attempts import Attempt
from dtrain.runtime.roster import Member


class JobStatus:
    """`members` is the roster's, read whenever the status is composed."""

    def __init__(self, plan: JobPlan, control: Control, members: Mapping[int, Member]) -> None:
        self._plan = plan
        self._control = control
        self._members = members
        self._steps = (read_json(RunDir(plan.run_dir).job) or {}).get("steps")
        self._saving = asyncio.Lock()
        self._attempt = 0
        self._done = 0  # the newest finished step as of the last look
        self._nodes = plan.nodes  # of the attempt
        self.state = "pending"
        self.reason: str | None = None
        self.look_for_losses()
        self.checkpoint: int | None = None

    def look_for_losses(self) -> None:
        """What the job goes on without is the reason of a state that is none by itself."""
        note = self._control.note.read_text() if self._control.note.exists() else ""
        left_out = [f"without node {node}: {reason}" for node, reason in self._control.left_out().items()]
        self.reason = "; ".join(filter(None, [note, *left_out])) or None

    def begin(self, attempt: Attempt, nodes: int) -> None:
        self._nodes = nodes
        self._attempt = attempt.number
        self._done = attempt.from_step
        self.checkpoint = attempt.from_step or None

    def finish_attempt(self, done: int) -> None:
        """The workers are gone; `done` is the newest step that they finished, 0 if none."""
        self._done = max(self.step, done)

    def end(self, state: str, reason: str) -> None:
        self.state = state
        self.reason = reason

    @property
    def step(self) -> int:
        """The newest finished step of the attempt."""
        return max([self._done, *(int(worker["done"]) for worker in self._workers())])

    def compose(self) -> dict[str, Any]:
        return {
            "name": self._plan.name,
            "run_dir": self._plan.run_dir,
            "backend": self._plan.backend,
            "job_id": self._plan.job_id,
            "state": self.state,
            "step": self.step,
            "steps": self._steps,
            "attempt": self._attempt,
            "world_size": self._nodes * self._plan.procs_per_node,
            "nodes": self._nodes,
            "nodes_asked": self._plan.nodes,
            "workers": self._workers(),
            "checkpoint": self.checkpoint,
            "reason": self.reason,
            "seen_at": round(time.time(), 3),
        }

    async def save(self) -> None:
        """Raises OSError. In a thread, because a disk that is busy with checkpoints may take seconds; one after the
        other, so that the last word stays the last."""
        async with self._saving:
            text = json.dumps(self.compose())
            await in_background(lambda: write_atomic(self._control.status, text, 0o600))

    def _workers(self) -> list[dict[str, Any]]:
        return [
            {**worker, "node": node, "host": member.process.host}
            for node, member in sorted(self._members.items())
            for worker in member.workers
        ]
