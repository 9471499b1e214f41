"""`dtrain status`: where a run stands, for a person or, with --json, as the documented object."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.rundir import read_json
from dtrain.launcher.console import duration, failure_view, nodes_of, plural, without_message
from dtrain.launcher.runs import resolve
from dtrain.launcher.state import documented, read_status

HELP = "Where a run stands: its job, its workers with step and phase, the newest checkpoint, the last failure."
IDLE_S = 5.0  # a worker that shows no change for longer than this is worth a word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a label, a run directory or a job id")
    parser.add_argument("--json", action="store_true", help="the documented object, on one line")


def run(args: argparse.Namespace) -> int:
    job, remark = resolve(args.run, Path.cwd())
    if remark:
        print(remark, file=sys.stderr)
    status = read_status(job)
    if args.json:
        print(json.dumps(documented(status), ensure_ascii=False))
    else:
        print("\n".join(view(status, read_json(job.run.failure), now=time.time())))
    return exits.UNKNOWN if status["state"] == "unknown" else exits.DONE


def view(status: Mapping[str, Any], failure: Mapping[str, Any] | None, *, now: float) -> list[str]:
    """The human page; `failure` is the content of failure.json."""
    why = without_message(status["reason"], failure)  # the failure has its own lines below
    reason = f": {why}" if why not in ("", status["state"]) else ""
    seen = f" (seen {duration(max(0.0, now - status['seen_at']))} ago)" if status["seen_at"] else ""
    nodes = nodes_of(status["nodes"], status["nodes_asked"])
    layout = f"{nodes}, {plural(status['world_size'], 'rank')}, attempt {status['attempt']}"
    checkpoint = "none yet" if status["checkpoint"] is None else f"step {status['checkpoint']}"
    lines = [
        f"{status['name']}: {status['state']}{reason}{seen}",
        f"  step         {status['step']}" + (f" of {status['steps']}" if status["steps"] else ""),
        f"  checkpoint   {checkpoint}",
        f"  job          {status['job_id']} on {status.get('called') or status['backend']}: {layout}",
        f"  run dir      {status['run_dir']}",
    ]
    lines += [f"  {_worker(worker)}" for worker in status["workers"]]
    if failure is not None:
        lines.append(f"last failure (attempt {failure.get('attempt', '?')}):")
        lines += [f"  {said.text}" for said in failure_view({**failure, "evidence": []})]
    return lines


def _worker(worker: Mapping[str, Any]) -> str:
    place = f"node {worker.get('node')} ({worker.get('host')}, pid {worker.get('pid')})"
    idle_s = worker.get("idle_s") or 0.0
    idle = f", no change for {duration(idle_s)}" if idle_s > IDLE_S else ""
    return f"rank {worker.get('global_rank'):<7} {place}  step {worker.get('step')}  {worker.get('phase')}{idle}"
