"""`dtrain stack`: where each rank is in its code at this moment, also one that hangs. Asks the control port."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.launcher.runs import resolve
from dtrain.launcher.state import ACTIVE, read_status
from dtrain.runtime.control import request

HELP = "Prints the Python stack of each rank, also of one that is stuck in a collective or in C code."
TIMEOUT_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a label, a run directory or a job id")
    parser.add_argument("--rank", type=int, metavar="R", help="only this global rank")
    parser.add_argument("--json", action="store_true", help="an object: global rank -> text")


def run(args: argparse.Namespace) -> int:
    job, remark = resolve(args.run, Path.cwd())
    if remark:
        print(remark, file=sys.stderr)
    status = read_status(job, look_for_checkpoint=False)
    if status["state"] not in ACTIVE:
        raise UsageError(
            f"{job.plan.name} is {status['state']}: only a run that goes on has stacks. See `dtrain status`."
        )
    answer = request(job.plan.run_dir, job.plan.job_id, "stack", timeout_s=TIMEOUT_S)
    stacks = choose(answer.get("stacks") or {}, args.rank)
    if args.json:
        print(json.dumps(stacks))
    else:
        print("\n\n".join(f"rank {rank}\n{text.rstrip()}" for rank, text in stacks.items()))
    return exits.DONE


def choose(stacks: Mapping[str, str], rank: int | None) -> dict[int, str]:
    """By global rank, or the one that was asked for. Raises UsageError where that rank is not there."""
    found = {int(key): text for key, text in stacks.items()}
    if rank is None:
        return dict(sorted(found.items()))
    if rank not in found:
        there = ", ".join(map(str, sorted(found))) or "none: its workers have not started yet"
        raise UsageError(f"--rank {rank}: no such rank at this moment. There are: {there}.")
    return {rank: found[rank]}
