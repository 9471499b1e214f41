"""`dtrain logs`: what the workers of a run printed, the nodes' files merged by time. Leaves the files as they are."""

from __future__ import annotations

import argparse
import heapq
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir
from dtrain.launcher.runs import Job, resolve
from dtrain.launcher.tail import LineTail

HELP = "What the workers printed, all nodes merged by time; each line as `[rank time] text`."
POLL_S = 0.2
HALF_DAY_S = 12 * 3600
_TAG = re.compile(r"\[(\d+) (\d\d):(\d\d):(\d\d(?:\.\d+)?)\] ?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a label, a run directory or a job id")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--rank", type=int, metavar="R", help="only this global rank")
    parser.add_argument("--attempt", type=int, metavar="A", help="left out: the newest")


def run(args: argparse.Namespace) -> int:
    job, remark = resolve(args.run, Path.cwd())
    if remark:
        print(remark, file=sys.stderr)
    attempts = attempts_with_logs(job.run)
    if args.attempt is not None and args.attempt not in attempts:
        raise UsageError(
            f"attempt {args.attempt} has no log. Attempts with one: {', '.join(map(str, attempts)) or 'none'}."
        )
    if not attempts and not args.follow:
        raise UsageError(f"no worker has written anything yet. The agents' own words: {job.run.path / 'logs'}")
    if args.follow:
        return _follow(job, args.rank, args.attempt)
    attempt = attempts[-1] if args.attempt is None else args.attempt
    for line in merge(_read(file) for file in node_logs(job.run, attempt)):
        _show(line, args.rank)
    return exits.DONE


@dataclass(frozen=True, slots=True)
class Line:
    """`time_s` since the midnight before its file's first line; a line without a tag has that of the one before."""

    time_s: float
    global_rank: int | None
    text: str


def attempts_with_logs(run: RunDir) -> list[int]:
    found = (re.fullmatch(r"a(\d+)", entry.name) for entry in (run.path / "logs").glob("a*"))
    return sorted(int(match[1]) for match in found if match)


def node_logs(run: RunDir, attempt: int) -> list[Path]:
    return sorted(run.log(attempt, 0).parent.glob("node-*.log"), key=lambda path: (len(path.name), path.name))


def parse(lines: Iterable[str]) -> Iterator[Line]:
    """A clock that falls back by more than half a day has passed midnight."""
    time_s, rank, days = 0.0, None, 0
    for text in lines:
        if match := _TAG.match(text):
            clock_s = int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4])
            days += clock_s + days * 86400 < time_s - HALF_DAY_S
            time_s, rank = clock_s + days * 86400, int(match[1])
        yield Line(time_s, rank, text)


def merge(files: Iterable[Iterable[str]]) -> Iterator[Line]:
    """By time; lines of one file keep their order. Bounded memory: files are read as they are needed."""
    return heapq.merge(*map(parse, files), key=lambda line: line.time_s)


def _read(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.removesuffix("\n")


def _show(line: Line, rank: int | None) -> None:
    if rank is None or line.global_rank == rank:
        print(line.text)


def _follow(job: Job, rank: int | None, attempt: int | None) -> int:
    """What is there and what comes, of one attempt or of all from the newest on."""
    attempts = attempts_with_logs(job.run)
    first = attempt if attempt is not None else attempts[-1] if attempts else 0
    tails: dict[Path, LineTail] = {}
    while True:
        over = job.backend_state() == "gone"  # asked first, so that the last lines are not missed
        for each in [a for a in attempts_with_logs(job.run) if a == attempt or (attempt is None and a >= first)]:
            logs = node_logs(job.run, each)
            new = [tails.setdefault(path, LineTail(path)).poll() for path in logs]
            for line in merge(new):
                _show(line, rank)
        sys.stdout.flush()
        if over:
            return exits.DONE
        time.sleep(POLL_S)
