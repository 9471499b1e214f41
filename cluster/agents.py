"""The agents of a job, as they have put themselves down in the run directory."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import Control, RunDir, read_json


def agents(plan: JobPlan, nodes: Iterable[int] | None = None) -> list[ProcessId]:
    """Those that have put themselves down, of all nodes or of some."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    found = (agent_of(control, node) for node in (range(plan.nodes) if nodes is None else nodes))
    return [process for process in found if process is not None]


def agent_of(control: Control, node_rank: int) -> ProcessId | None:
    """The agent that has put itself down last."""
    record = read_json(control.node(node_rank))
    return None if record is None else ProcessId.from_json(record)
