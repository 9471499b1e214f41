"""`dtrain logs`: what the workers of a run printed, the nodes' files merged by time. Leaves the files as they are."""

from __future__ import annotations

import argparse
import heapq
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir, look_again
from dtrain.launcher.follow import BACKEND_AGE_S
from dtrain.launcher.runs import Job, resolve
from dtrain.launcher.tail import LineTail

HELP = "What the workers printed, all nodes merged by time; each line as `[rank time] text`."
POLL_S = 0.2
LOOK_S = 1.0  # into a store
_DATE = re.compile(r"\[date (\d{4}-\d\d-\d\d [+-]\d{4})\]$")
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
    shown = False
    for line in merge(LineParser().parse(_read(file)) for file in node_logs(job.run, attempt)):
        shown = _show(line, args.rank) or shown
    if not shown:
        _say_nothing_shown(job, args.rank, attempt)
    return exits.DONE


@dataclass(frozen=True, slots=True)
class Line:
    """`time_s` since the epoch; a line without a tag has that of the one before."""

    time_s: float
    global_rank: int | None
    text: str


class LineParser:
    """The lines of one file, in order. Its date lines (runtime/nodelog.py) say on which day the times are."""

    def __init__(self) -> None:
        self._midnight_s = 0.0
        self._time_s = 0.0
        self._rank: int | None = None

    def parse(self, texts: Iterable[str]) -> Iterator[Line]:
        for text in texts:
            if date := _DATE.match(text):
                self._midnight_s = datetime.strptime(date[1], "%Y-%m-%d %z").timestamp()
                continue
            if match := _TAG.match(text):
                self._time_s = self._midnight_s + int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4])
                self._rank = int(match[1])
            yield Line(self._time_s, self._rank, text)


def attempts_with_logs(run: RunDir) -> list[int]:
    found = (re.fullmatch(r"a(\d+)", entry.name) for entry in (run.path / "logs").glob("a*"))
    return sorted(int(match[1]) for match in found if match)


def node_logs(run: RunDir, attempt: int) -> list[Path]:
    return sorted(run.log(attempt, 0).parent.glob("node-*.log"), key=lambda path: (len(path.name), path.name))


def merge(files: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """By time; lines of one file keep their order. Bounded memory: files are read as they are needed."""
    return heapq.merge(*files, key=lambda line: line.time_s)


def _read(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.removesuffix("\n")


def _show(line: Line, rank: int | None) -> bool:
    """True when the line was wanted."""
    wanted = rank is None or line.global_rank == rank
    if wanted:
        print(line.text)
    return wanted


def _say_nothing_shown(job: Job, rank: int | None, attempt: int | None) -> None:
    who = "no worker has" if rank is None else f"rank {rank} has not"
    when = "" if attempt is None else f" in attempt {attempt}"
    print(f"{job.plan.name}: {who} printed anything{when}", file=sys.stderr)
    print(f"  its steps and losses are in {job.run.metrics}", file=sys.stderr)


def _follow(job: Job, rank: int | None, attempt: int | None) -> int:
    """What is there and what comes, of one attempt or of all from the newest on."""
    attempts = attempts_with_logs(job.run)
    first = attempt if attempt is not None else attempts[-1] if attempts else 0
    files: dict[Path, tuple[LineTail, LineParser]] = {}
    shown = False
    while True:
        look_again(job.run.path, LOOK_S)
        over = job.backend_state(BACKEND_AGE_S) == "gone"  # asked first, so that the last lines are not missed
        if over:
            look_again(job.run.path)
        found = [a for a in attempts_with_logs(job.run) if a == attempt or (attempt is None and a >= first)]
        for each in found:
            for line in merge([_new_lines(path, files) for path in node_logs(job.run, each)]):
                shown = _show(line, rank) or shown
        sys.stdout.flush()
        if over:
            if not shown:
                _say_nothing_shown(job, rank, attempt)
            return exits.DONE
        for old in found[:-2]:  # nobody writes there any more; each open file counts in a run with many restarts
            for path in node_logs(job.run, old):
                if path in files:
                    files.pop(path)[0].close()
            first = old + 1
        time.sleep(POLL_S)


def _new_lines(path: Path, files: dict[Path, tuple[LineTail, LineParser]]) -> Iterator[Line]:
    tail, parser = files.setdefault(path, (LineTail(path), LineParser()))
    return parser.parse(tail.poll())
