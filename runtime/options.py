"""What an agent is told on its command line, and the times by which agents and coordinator judge each other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.cluster.zygote import PRELOAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    heartbeat_s: float = 1.0
    dead_after_s: float = 5.0  # silence after which a node, or the coordinator, counts as lost
    handshake_s: float = 3.0
    claim_delay_s: float = 0.1  # times the node rank: low ranks become coordinator first
    evidence_s: float = 0.3  # from a failure's first sign to the decision, so that the culprit can speak
    join_s: float = 30.0  # for a node to appear, before it is started again
    setup_s: float = 600.0  # for its setup lines, before that
    kill_s: float = 5.0  # for a node to confirm that its workers are gone
    stop_s: float = 60.0  # for workers to save and end after a stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    run_dir: str
    job_id: str
    node_rank: int
    incarnation: int = 0  # which start of the job by a scheduler that may start it more than once; 0: there is one
    entry: str = ""  # "": what the plan's kind asks for
    preload: tuple[str, ...] = PRELOAD
    timings: Timings = Timings()
    agent_args: tuple[str, ...] = ()  # the part of the command line that a replaced node must be given too


def parse_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="dtrain.runtime.agent", description="starts and watches one node's workers")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--node-rank", required=True, type=int)
    parser.add_argument("--incarnation", type=int, default=0, help="which start of the job it belongs to")
    parser.add_argument("--entry", default="", help="module:function that a worker runs in the place of ours")
    parser.add_argument("--preload", default=",".join(PRELOAD), help="modules that the warm parent imports")
    parser.add_argument("--timings", default="{}", help="JSON of fields of Timings")
    given = parser.parse_args(argv)
    passed_on = ["--entry", given.entry, "--preload", given.preload, "--timings", given.timings]
    passed_on += ["--incarnation", str(given.incarnation)] if given.incarnation else []
    return Options(
        run_dir=given.run_dir,
        job_id=given.job_id,
        node_rank=given.node_rank,
        incarnation=given.incarnation,
        entry=given.entry,
        preload=tuple(name for name in given.preload.split(",") if name),
        timings=Timings(**json.loads(given.timings)),
        agent_args=tuple(passed_on),
    )
