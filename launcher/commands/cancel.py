"""`dtrain cancel`: ends a run for good. The mark comes before the signal, so that it is not taken for a preemption."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import read_json, write_once
from dtrain.launcher.departure import wait_until_gone
from dtrain.launcher.follow import again_command
from dtrain.launcher.runs import Job, resolve
from dtrain.launcher.state import read_status
from dtrain.launcher.submit import end

HELP = "Ends a run: its state is saved first, unless it does not answer within the grace. It can be launched again."
POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a label, a run directory or a job id")
    parser.add_argument(
        "--grace", type=float, default=75.0, metavar="S", help="seconds to save before it is killed (75)"
    )


def run(args: argparse.Namespace) -> int:
    job, remark = resolve(args.run, Path.cwd())
    if remark:
        print(remark, file=sys.stderr)
    status = read_status(job, look_for_checkpoint=False)
    if status["state"] == "unknown":
        print(
            f"{args.run}: {status['reason']}; nothing was done. Cancel it from where it was launched.", file=sys.stderr
        )
        return exits.UNKNOWN
    if read_json(job.control.ended) is not None or job.backend_state() == "gone":
        print(f"{job.plan.name} is over already: {status['state']} at step {status['step']}")
        return exits.DONE
    write_once(job.control.cancel, b"", mode=0o600)
    job.backend.stop(job.plan)
    print(f"{job.plan.name}: cancelling, its state is saved first", flush=True)
    if not _wait_for_end(job, args.grace, time.monotonic):
        job.backend.kill(job.plan)
        end(
            job, state="cancelled", exit_code=exits.CANCELLED,
            reason=f"killed: it did not end within {args.grace:g} s", step=int(status["step"] or 0),
        )  # fmt: skip
    wait_until_gone(job)
    return _say_how_it_ended(job)


def _wait_for_end(job: Job, grace_s: float, clock: Callable[[], float]) -> bool:
    """True when the job has written its end and its processes are gone, or they are gone without a word."""
    deadline = clock() + grace_s
    while clock() < deadline:
        if job.backend.state(job.plan) == "gone":
            return True
        time.sleep(POLL_S)
    return False


def _say_how_it_ended(job: Job) -> int:
    ended = read_json(job.control.ended)
    if ended is None:
        end(job, state="cancelled", exit_code=exits.CANCELLED, reason="its nodes died while it was saving", step=0)
        ended = read_json(job.control.ended)
    if ended is None:
        raise UsageError(f"{job.control.ended} can't be written")
    reason = f": {ended['reason']}" if ended.get("reason") not in (None, "", ended["state"]) else ""
    print(f"{job.plan.name}: {ended['state']} at step {ended['step']}{reason}")
    print(f"  to go on all the same:  {again_command(job)}")
    return exits.DONE
