"""`dtrain ls`: the runs that are known here: those of the label registry and those under ./runs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.rundir import look_again
from dtrain.launcher.console import duration
from dtrain.launcher.runs import known_jobs
from dtrain.launcher.state import documented, read_status

HELP = "The runs that were launched from this account, and those under ./runs; the newest first."
COLUMNS = ("RUN", "STATE", "STEP", "AGE", "NODES", "BACKEND", "RUN DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of the objects that `status --json` gives")


def run(args: argparse.Namespace) -> int:
    jobs = known_jobs(Path.cwd())
    for job in jobs:
        look_again(job.run.path)
    found = [documented(read_status(job, look_for_checkpoint=False)) for job in jobs]
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    elif not found:
        print("No runs. Start one with: dtrain launch cfg.yaml")
    else:
        now = time.time()
        ages = [duration(max(0.0, now - job.submitted_at)) for job in jobs]
        print("\n".join(table([COLUMNS, *map(_row, found, ages)])))
    return exits.DONE


def _row(status: Mapping[str, Any], age: str) -> tuple[str, ...]:
    step = f"{status['step']}/{status['steps'] or '?'}"
    return (
        status["name"], status["state"], step, age, str(status["nodes"]), status["backend"], status["run_dir"],
    )  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the last one as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
