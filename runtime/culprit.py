"""Which of many failures was the first cause. Pure: facts in, the culprit and its victims out.

A node that dies takes its workers along, a worker that dies breaks the collectives of all others: most failures of an
attempt are echoes. An echo often speaks first, so time alone is not enough.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One sign of failure: a report, a bad end of a worker, or a lost node (then `global_rank` is None)."""

    kind: str  # exception | corrupt_checkpoint | fenced | nonfinite | ... | signal | exit | node_lost | start
    node: int
    time: float
    message: str
    global_rank: int | None = None
    step: int = 0
    phase: str = ""
    where: str = ""
    evidence: tuple[str, ...] = ()
    victim: bool = False
    retry: bool = True
    signal: int = 0
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """failure.json"""

    kind: str
    global_rank: int | None
    node: int
    attempt: int
    step: int
    phase: str
    message: str
    where: str
    evidence: tuple[str, ...]
    collateral: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_culprit(facts: Sequence[Fact]) -> Fact:
    """The first cause among at least one fact."""
    return min(facts, key=lambda fact: (_weight(fact), fact.time, -1 if fact.global_rank is None else fact.global_rank))


def _weight(fact: Fact) -> int:
    """0: can't be another's doing. 1: may be (abort() is how libraries react to a dead peer). 2: is."""
    if fact.victim:
        return 2
    if fact.kind == "exit" or fact.signal == signal.SIGABRT:
        return 1
    return 0


def describe(culprit: Fact, attempt: int, ranks: Iterable[int]) -> Failure:
    """The record for failure.json. All other ranks of the attempt are collateral: they are ended, whatever they say."""
    return Failure(
        kind=culprit.kind,
        global_rank=culprit.global_rank,
        node=culprit.node,
        attempt=attempt,
        step=culprit.step,
        phase=culprit.phase,
        message=culprit.message,
        where=culprit.where,
        evidence=culprit.evidence,
        collateral=tuple(rank for rank in sorted(ranks) if rank != culprit.global_rank),
    )


def fact_of_report(node: int, global_rank: int, report: dict[str, Any]) -> Fact:
    """From a worker's own failure report (runtime/report.py)."""
    return Fact(
        kind=str(report.get("kind", "exception")),
        node=node,
        global_rank=global_rank,
        time=float(report.get("time", 0.0)),
        message=str(report.get("message", "")),
        where=str(report.get("where", "")),
        evidence=tuple(str(line) for line in report.get("evidence", ())),
        step=int(report.get("step") or 0),
        phase=str(report.get("phase", "")),
        victim=bool(report.get("victim", False)),
        retry=bool(report.get("retry", True)),
        data=dict(report.get("data") or {}),
    )


def fact_of_exit(node: int, message: dict[str, Any], never_retry: int) -> Fact:
    """From the end of a worker that left no report; its last lines on stderr are the evidence."""
    number, code = int(message["signal"]), int(message["code"])
    text = f"ended with exit code {code}, without a word and before its program's end (os._exit, or a C library's exit)"
    if number:
        text = f"killed by {_signal_name(number)}"
    if number == signal.SIGKILL:
        text += ": by a person, or by the kernel when memory ran out"
    return Fact(
        kind="signal" if number else "exit",
        node=node,
        global_rank=int(message["global_rank"]),
        time=float(message["time"]),
        message=text,
        evidence=tuple(message["evidence"]),
        step=int(message["step"]),
        phase=str(message["phase"]),
        signal=number,
        retry=code != never_retry,
    )


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
