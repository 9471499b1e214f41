"""What a Ray job of ours runs as its entry point: puts the job's keeper into Ray, sees that it stays there, and ends
with the run's exit code. It may be killed at any moment: the keeper does without it.

    python -P -m dtrain.cluster.ray.driver --run-dir DIR --job-id ID --key KEY
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ray.files import LEAVE_S, RayFiles
from dtrain.cluster.ray.keeper import KeeperActor
from dtrain.cluster.ray.node import read_plan, why_not
from dtrain.cluster.ray.placing import NAMESPACE, clear, end_keeper, get_group, keeper_name, start_nodes
from dtrain.cluster.rundir import put_end, read_json, write_once

_POLL_S = 0.25
_TRIES = 3
_SEE_S = 5.0  # between two looks whether the keeper is there
_AT_ONCE_S = 2.0  # for a group that need not wait to have its nodes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dtrain.cluster.ray.driver")
    for name in ("--run-dir", "--job-id", "--key"):
        parser.add_argument(name, required=True)
    args = parser.parse_args(argv)
    if problem := why_not(args.run_dir, args.job_id):
        print(problem, file=sys.stderr)
        return exits.NEVER_RETRY
    plan = read_plan(args.run_dir, args.job_id)
    files = RayFiles(plan)
    if not files.is_over() and (problem := _follow(plan, files, args.key)):
        print(problem, file=sys.stderr)
        return exits.NEVER_RETRY
    ended = read_json(files.control.ended) or {"exit_code": exits.FAILED, "state": "killed", "reason": ""}
    print(f"{plan.job_id}: {ended['state']} {ended['reason']}".rstrip(), flush=True)
    return int(ended["exit_code"])


def _follow(plan: JobPlan, files: RayFiles, key: str) -> str:
    """To the end of the job; why there is none where it can't begin."""
    import ray

    _pass_stops_on(files)
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    keeper = _keeper(plan, key)  # before all else: what is there is cleared by it
    _place(plan, files, key)
    problem = _see_to(keeper, plan, files, key)
    if problem and files.control.path.is_dir():
        put_end(files.run, files.control, state="failed", exit_code=exits.NEVER_RETRY, reason=problem, step=0)
    clear(plan, files, LEAVE_S)  # which finds something only where the keeper could not
    end_keeper(plan.job_id)
    return problem


def _place(plan: JobPlan, files: RayFiles, key: str) -> None:
    """What the keeper does first, so that a job which need not wait does not wait for its keeper's start either. What
    fails here fails there too, and is told there."""
    import ray

    with contextlib.suppress(ValueError, TypeError, RuntimeError, ray.exceptions.RayError):
        group = get_group(plan)
        if group.wait(_AT_ONCE_S) and not files.is_over():
            start_nodes(plan, files, group, key)


def _see_to(keeper: Any, plan: JobPlan, files: RayFiles, key: str) -> str:
    """That there is one, until the job is over and Ray cleared of it; why there can be none."""
    import ray

    asked, asked_at, over_at, failures = [keeper.problem.remote()], time.monotonic(), 0.0, 0
    while True:
        now, standing = time.monotonic(), files.standing()
        over_at = over_at or (now if files.is_over() else 0.0)
        if over_at and ((standing and standing.phase == "over") or now - over_at > 2 * LEAVE_S):
            return ""
        heard, asked = ray.wait(asked, timeout=0) if asked else ([], [])
        try:
            if heard and (problem := str(ray.get(heard[0]))):
                return problem
        except ray.exceptions.RayError as error:
            failures += 1
            if failures >= _TRIES and standing is None:
                return f"Ray can't start the job's keeper: {str(error).strip().splitlines()[-1]}"
        if not asked and now - asked_at > _SEE_S and not over_at:
            asked, asked_at = [_keeper(plan, key).problem.remote()], now
        time.sleep(_POLL_S)


def _keeper(plan: JobPlan, key: str) -> Any:
    import ray

    actor = ray.remote(KeeperActor).options(
        name=keeper_name(plan.job_id), get_if_exists=True, lifetime="detached", max_restarts=-1, num_cpus=0
    )
    return actor.remote(plan.run_dir, plan.job_id, key)


def _pass_stops_on(files: RayFiles) -> None:
    """`ray job stop` ends this process; the run saves and ends after it."""

    def stop(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(FileNotFoundError):  # the run was removed
            write_once(files.control.stop(0), "asked for by `ray job stop`", 0o600)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


if __name__ == "__main__":
    sys.exit(main())
