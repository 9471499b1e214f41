"""`dtrain attach`: a short recap of a run, then the same view as the one who launched it has."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.rundir import read_json
from dtrain.launcher.commands.status import view
from dtrain.launcher.follow import bookmark, follow
from dtrain.launcher.runs import resolve
from dtrain.launcher.screen import make_screen
from dtrain.launcher.state import ACTIVE, read_status

HELP = (
    "Follows a run from now until it ends. Ctrl-C leaves a run that a scheduler keeps; a local one it saves and stops."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a label, a run directory or a job id")


def run(args: argparse.Namespace) -> int:
    job, remark = resolve(args.run, Path.cwd())
    if remark:
        print(remark, file=sys.stderr)
    since = bookmark(job.run)
    status = read_status(job)
    print("\n".join(view(status, read_json(job.run.failure), now=time.time())), flush=True)
    ended = read_json(job.control.ended)
    if ended is not None and status["state"] not in (*ACTIVE, "unknown"):
        return int(ended.get("exit_code", exits.FAILED))
    if status["state"] in ACTIVE:
        leaving = (
            "leaves, the run goes on" if job.backend.detaches else "saves and stops the run, a second one kills it"
        )
        print(f"following; Ctrl-C {leaving}", flush=True)
    return follow(job, make_screen(job.steps), since, attempt=int(status["attempt"]))
