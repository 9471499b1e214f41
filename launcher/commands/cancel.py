"""`dtrain cancel`: ends a run for good. The mark comes before the signal, so that it is not taken for a preemption."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import look_again, read_json, write_atomic, write_once
from dtrain.launcher.departure import wait_until_gone
from dtrain.launcher.follow import again_command
from dtrain.launcher.runs import Job, resolve
from dtrain.launcher.state import read_status
from dtrain.launcher.submit import end
from dtrain.runtime.control import ControlError, request

HELP = "Ends a run: its state is saved first, unless it does not answer within the grace. It can be launched again."
POLL_S = 0.1
LOOK_S = 1.0  # into a store
CONTROL_S = 5.0
AGAIN_S = 2.0
NOTHING_YET_S = 10.0  # to end by itself for a job that has no state to save


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
        where = (
            "Cancel it again when it can be asked." if job.backend.detaches else "Cancel it from where it was launched."
        )
        print(f"{args.run}: {status['reason']}; nothing was done. {where}", file=sys.stderr)
        return exits.UNKNOWN
    if job.final_end() is not None or job.backend_state() == "gone":
        print(f"{job.plan.name} is over already: {status['state']} at step {status['step']}")
        return exits.DONE
    write_once(job.control.cancel, b"", mode=0o600)
    ask_to_stop(job)
    saving = "it does not run now" if status["state"] in ("pending", "requeued") else "its state is saved first"
    print(f"{job.plan.name}: cancelling, {saving}", flush=True)
    grace_s = args.grace
    if not job.control.status.exists() and grace_s > NOTHING_YET_S:
        # Lines of `setup` may take for ever, and a node that runs them hears a stop only when they are through.
        grace_s = NOTHING_YET_S
    ended = _wait_for_end(job, grace_s, time.monotonic)
    if not ended and grace_s < args.grace and job.control.status.exists():
        grace_s, ended = args.grace, _wait_for_end(job, args.grace, time.monotonic)
    if not ended:
        job.backend.kill(job.plan)
        end(
            job, state="cancelled", exit_code=exits.CANCELLED,
            reason=f"killed: it did not end within {grace_s:g} s", step=int(status["step"] or 0),
        )  # fmt: skip
    wait_until_gone(job)
    never_began = status["state"] == "pending" and not job.control.status.exists()
    return _say_how_it_ended(job, "before it began" if never_began else "its nodes died while it was saving")


def ask_to_stop(job: Job) -> None:
    """By the shortest way: its coordinator where it can be reached, which a scheduler's signal is not needed for."""
    if job.backend.detaches and job.control.status.exists() and not job.control.ended.exists():
        with contextlib.suppress(ControlError):
            request(job.plan.run_dir, job.plan.job_id, "stop", timeout_s=CONTROL_S)
            return
    job.backend.stop(job.plan)


def _wait_for_end(job: Job, grace_s: float, clock: Callable[[], float]) -> bool:
    """True when the job has written its end and its processes are gone, or they are gone without a word."""
    now = clock()
    deadline, again_at = now + grace_s, now
    while (now := clock()) < deadline:
        look_again(job.run.path, LOOK_S)
        if job.backend.state(job.plan) == "gone":
            return True
        ended = read_json(job.control.ended)
        if ended is not None and now >= again_at and job.may_start_again(ended):
            # It stopped for another reason before it saw the mark: it is kept from coming back, as soon as that works.
            again_at = now + AGAIN_S
            job.backend.stop(job.plan)
        time.sleep(POLL_S)
    return False


def _say_how_it_ended(job: Job, silent: str) -> int:
    """`silent`: what happened where nobody could write it down."""
    look_again(job.run.path)
    ended = read_json(job.control.ended)
    if ended is not None and job.may_start_again(ended):
        last_word = {**ended, "state": "cancelled", "exit_code": exits.CANCELLED, "reason": "while it waited to go on"}
        write_atomic(job.control.ended, json.dumps(last_word), mode=0o600)
        ended = last_word
    if ended is None:
        end(job, state="cancelled", exit_code=exits.CANCELLED, reason=silent, step=0)
        ended = read_json(job.control.ended)
    if ended is None:
        raise UsageError(f"{job.control.ended} can't be written")
    reason = f": {ended['reason']}" if ended.get("reason") not in (None, "", ended["state"]) else ""
    print(f"{job.plan.name}: {ended['state']} at step {ended['step']}{reason}")
    print(f"  to go on all the same:  {again_command(job)}")
    return exits.DONE
