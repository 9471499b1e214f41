"""What a pod does before it becomes the agent: it finds out which start of the job this is. After a stop with its state
saved (85) the Job makes every pod anew; the first of them opens the next start, as a Slurm job's driver does it.

    python -m dtrain.cluster.kubernetes.podstart --run-dir DIR --job-id ID [options of the agent] --node-rank K
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.agentcommand import AGENT
from dtrain.cluster.restarts import drop_nodes, forget_stop
from dtrain.cluster.rundir import (
    Control,
    RunDir,
    append_event,
    archive,
    look_again,
    read_json,
    write_atomic,
    write_once,
)

_POLL_S = 0.1
_STAND_BY_S = 1.0
_PATIENCE_S = 10.0  # for the pod that opens a start, before another one does it in its place


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dtrain.cluster.kubernetes.podstart")
    for option in ("--run-dir", "--job-id", "--node-rank"):
        parser.add_argument(option, required=True)
    options, agent_args = parser.parse_known_args(argv)
    run = RunDir(options.run_dir)
    look_again(run.path)
    record = read_json(run.job) or {}
    if record.get("job_id") != options.job_id:
        print(f"{run.job}: the run belongs to job {record.get('job_id')} now", file=sys.stderr)
        return exits.NEVER_RETRY
    control = run.control(options.job_id)
    start = join_start(run, control)
    _stand_by(control, int(options.node_rank))
    if (ended := read_json(control.ended)) is not None:
        return int(ended["exit_code"])
    with contextlib.suppress(OSError):
        os.chdir(record["cwd"])
    own = ("--run-dir", options.run_dir, "--job-id", options.job_id, "--incarnation", str(start))
    os.execv(sys.executable, [sys.executable, *AGENT, *own, *agent_args, "--node-rank", options.node_rank])


def _stand_by(control: Control, node_rank: int) -> None:
    """The run goes on without this node: it is needed again when the run is started anew."""
    while control.without(node_rank).exists() and not control.ended.exists():
        time.sleep(_STAND_BY_S)
        look_again(control.path)


def join_start(run: RunDir, control: Control, patience_s: float = _PATIENCE_S) -> int:
    """The number of this start of the job, from 0. Where the one before has ended with 85, the next one is opened: by
    one pod, whose place another takes should it die on the way; doing it twice does no harm."""
    waited_since = None
    while True:
        # In this order: an end that is there after they were counted is no archived one, and where there is none the
        # newest start is the one to join.
        archived = _archived(control)
        ended = _may_start_again(control)
        started = _highest(control, "start-[0-9]*")
        if not ended:
            return started
        if started == archived and write_once(_opening(control, started + 1), "", 0o600):
            _open(run, control, started + 1)
            return started + 1
        waited_since = waited_since or time.monotonic()
        if time.monotonic() - waited_since > patience_s:
            _open(run, control, started)
            return started
        time.sleep(_POLL_S)
        look_again(control.path)


def _may_start_again(control: Control) -> bool:
    ended = read_json(control.ended)
    return ended is not None and int(ended["exit_code"]) == exits.STOPPED and not control.cancel.exists()


def _open(run: RunDir, control: Control, start: int) -> None:
    write_atomic(control.incarnation, str(start), 0o600)  # from here on agents of earlier ones end
    drop_nodes(control)
    forget_stop(control)
    if control.cancel.exists():  # by a person, who may have come just now
        write_once(control.stop(start), "cancelled by a person", 0o600)
    with contextlib.suppress(FileNotFoundError):
        archive(control.ended, control.path / f"ended-{start - 1:04d}.json")
        append_event(run, "requeued", restart=start)


def _opening(control: Control, start: int) -> Path:
    return control.path / f"start-{start:04d}"


def _archived(control: Control) -> int:
    """How many starts have been followed by another one."""
    return len(list(control.path.glob("ended-[0-9]*.json")))


def _highest(control: Control, pattern: str) -> int:
    return max((int(path.name.partition("-")[2]) for path in control.path.glob(pattern)), default=0)


if __name__ == "__main__":
    sys.exit(main())
