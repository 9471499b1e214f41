"""Who is blamed, as a table: the first cause and not its echoes, whoever spoke first."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from dtrain.runtime.culprit import Fact, describe, fact_of_exit, fact_of_report, find_culprit


def fact(rank: int | None, kind: str = "exception", time: float = 1.0, **changes: Any) -> Fact:
    return Fact(**{"kind": kind, "node": 0, "global_rank": rank, "time": time, "message": f"{kind} {rank}", **changes})


def victim(rank: int, time: float = 1.0) -> Fact:
    return fact(rank, time=time, victim=True)


LOST = Fact(kind="node_lost", node=1, time=9.0, message="node 1 was lost")
ABORTED = fact(2, "signal", time=1.0, signal=int(signal.SIGABRT))

CASES: list[tuple[str, list[Fact], int | None]] = [
    ("alone", [fact(3)], 3),
    ("the earliest of equals", [fact(1, time=2.0), fact(2, time=1.0)], 2),
    ("the lowest rank at one instant", [fact(2), fact(1)], 1),
    ("a victim speaks first", [victim(0, 0.5), fact(3, time=0.9)], 3),
    ("a signal beats victims", [victim(0, 0.5), fact(2, "signal", signal=9, time=0.7)], 2),
    ("a lost node is known late", [victim(0, 0.5), victim(1, 0.6), LOST], None),
    ("a library aborts on a dead peer", [ABORTED, fact(3, time=1.2)], 3),
    ("an abort beats victims", [victim(0, 0.5), ABORTED], 2),
    ("a silent exit beats victims", [victim(0, 0.5), fact(1, "exit", time=0.8)], 1),
    ("a silent exit against a real exception", [fact(1, "exit", time=0.8), fact(2, time=0.9)], 2),
    ("only victims", [victim(2, 0.7), victim(1, 0.6)], 1),
    ("the culprit before its node's loss", [fact(3, time=8.0), LOST], 3),
]


@pytest.mark.parametrize(("facts", "rank"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_culprit(facts: list[Fact], rank: int | None) -> None:
    assert find_culprit(facts).global_rank == rank
    assert find_culprit(facts[::-1]).global_rank == rank


def test_everybody_else_is_collateral() -> None:
    assert describe(fact(2), 3, range(4)).collateral == (0, 1, 3)
    assert describe(LOST, 3, range(4)).collateral == (0, 1, 2, 3)


def test_the_record_has_what_scripts_rely_on() -> None:
    keys = {"kind", "global_rank", "node", "attempt", "step", "phase", "message", "where", "evidence", "collateral"}
    assert describe(fact(2), 3, range(4)).to_json().keys() == keys


def test_a_bad_end_without_report() -> None:
    ended = {"global_rank": 1, "code": 0, "signal": 9, "time": 1.0, "evidence": ["x"], "step": 4, "phase": "data"}
    assert "SIGKILL (signal 9)" in fact_of_exit(0, ended, 93).message
    coded = fact_of_exit(0, {**ended, "signal": 0, "code": 93}, 93)
    assert (coded.kind, coded.retry, coded.evidence) == ("exit", False, ("x",))


def test_a_report_with_nothing_in_it_is_still_a_fact() -> None:
    assert fact_of_report(0, 1, {"type": "failure"}).kind == "exception"
