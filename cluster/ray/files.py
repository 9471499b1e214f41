"""What the parts of a job on Ray tell each other through control/<job_id>/, which all nodes and the submitter share:
the keeper's view of the job, its nodes, and what is asked of it. All of it can be lost and written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, read_json, write_atomic, write_once

LEAVE_S = 15.0  # after the job's end, for agents to leave and the keeper to clear Ray of the job


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node of Ray's, while it lives: another one at the same address has another id."""

    id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the keeper has seen last. `lost`: node rank -> why its place can't be filled."""

    phase: Literal["waiting", "running", "over"]
    words: str = ""
    lost: dict[str, str] = field(default_factory=dict)
    at: float = 0.0  # seconds since the epoch

    @property
    def age_s(self) -> float:
        return time.time() - self.at


class RayFiles:
    def __init__(self, plan: JobPlan) -> None:
        self.run = RunDir(plan.run_dir)
        self.control = self.run.control(plan.job_id)
        self.job_id = plan.job_id
        path = self.control.path
        self.address = path / "ray-address"  # of the Jobs API that has the job
        self.intent = path / "ray-intent"  # exists: a submission was begun
        self.killed = path / "ray-killed"  # exists: nothing of the job is to live any more
        self._standing = path / "ray.json"
        self._nodes = path / "ray-nodes.json"
        self._agent = path / "ray-agent.json"

    def environ(self, key: str) -> Path:
        """The environment that this key opens: a job that is submitted twice has two, and Ray one of the keys."""
        return self.control.path / f"environ-{hashlib.sha256(key.encode()).hexdigest()[:16]}.sealed"

    def remove_environs(self) -> None:
        for path in self.control.path.glob("environ-*.sealed"):
            path.unlink(missing_ok=True)

    def is_over(self) -> bool:
        """Whether nothing more is to be started: it has ended, was killed or removed, or another job has the run."""
        if self.control.ended.exists() or self.killed.exists() or not self.control.token.exists():
            return True
        record = read_json(self.run.job)
        return record is None or record.get("job_id") != self.job_id

    def ended_at(self) -> float:
        """By the file system's clock; now for a job that was killed or removed."""
        with contextlib.suppress(OSError):
            return 0.0 if self.killed.exists() else self.control.ended.stat().st_mtime
        return 0.0

    def put_standing(self, standing: Standing) -> None:
        with contextlib.suppress(FileNotFoundError):  # the run was removed
            write_atomic(self._standing, json.dumps({**asdict(standing), "at": round(time.time(), 3)}), 0o600)

    def standing(self) -> Standing | None:
        record = read_json(self._standing)
        return None if record is None else Standing(**record)

    def put_first_nodes(self, bundles: Sequence[int], nodes: Mapping[int, RayNode]) -> None:
        """Whoever comes first has said it for all."""
        write_once(self._nodes, _record_of(bundles, nodes), 0o600)

    def put_nodes(self, bundles: Sequence[int], nodes: Mapping[int, RayNode]) -> None:
        write_atomic(self._nodes, _record_of(bundles, nodes), 0o600)

    def bundles(self) -> list[int] | None:
        """The bundle of each node rank; None before they are known."""
        record = read_json(self._nodes)
        return None if record is None else [int(bundle) for bundle in record["bundles"]]

    def nodes(self) -> dict[int, RayNode]:
        """Node rank -> the last node of Ray's that it was on."""
        return _nodes_of(read_json(self._nodes))

    def nodes_before(self) -> dict[int, RayNode]:
        """Those of the run's job before this one."""
        others = [path for path in self.run.path.glob("control/*/ray-nodes.json") if path != self._nodes]
        newest = max(others, key=lambda path: path.stat().st_mtime, default=None)
        return {} if newest is None else _nodes_of(read_json(newest))

    def put_agent_argv(self, argv: Sequence[str]) -> None:
        write_atomic(self._agent, json.dumps(list(argv)), 0o600)

    def agent_argv(self) -> list[str]:
        """An agent's command line but for the node's rank, which comes last."""
        return [str(word) for word in json.loads(self._agent.read_text())]

    def again(self, node_rank: int) -> Path:
        """Holds the process in whose place another agent is to be started."""
        return self.control.path / f"ray-again-{node_rank}"

    def gave_up(self, node_rank: int) -> Path:
        """Exists: the node starts no more agents, for the reason that it holds."""
        return self.control.path / f"ray-gave-up-{node_rank}"


def _record_of(bundles: Sequence[int], nodes: Mapping[int, RayNode]) -> str:
    return json.dumps({"bundles": list(bundles), "nodes": {rank: asdict(node) for rank, node in nodes.items()}})


def _nodes_of(record: dict[str, Any] | None) -> dict[int, RayNode]:
    return {} if record is None else {int(rank): RayNode(**node) for rank, node in record["nodes"].items()}
