"""What follows from the end of an attempt, as a table: facts in, decision out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dtrain.runtime.culprit import Fact
from dtrain.runtime.decide import Decision, Memory, Outcome, decide


def error(step: int = 5, message: str = "ValueError: bad", **changes: Any) -> Fact:
    return Fact(
        **{"kind": "exception", "node": 0, "global_rank": 1, "time": 1.0, "step": step, "message": message, **changes}
    )


KILLED = Fact(kind="signal", node=0, global_rank=1, time=1.0, step=5, message="killed by SIGKILL", signal=9)
LOST = Fact(kind="node_lost", node=1, time=1.0, step=5, message="node 1 was lost")
CORRUPT = Fact(
    kind="corrupt_checkpoint", node=0, global_rank=0, time=1.0, message="damaged", data={"step": 40, "attempt": 2}
)
SEEN = Memory(attempt=3, reached=5, signature="5||ValueError: bad")
STUCK = Memory(attempt=3, reached=5, stuck=2)

CASES = [
    ("all done", Memory(), Outcome(reached=9, codes=frozenset({0})), "done", 0),
    ("all stopped", Memory(), Outcome(reached=9, codes=frozenset({85})), "stopped", 85),
    ("some done, some stopped", Memory(), Outcome(reached=9, codes=frozenset({0, 85})), "stopped", 85),
    ("asked to stop", Memory(stop="stop"), Outcome(reached=9, codes=frozenset({85})), "stopped", 85),
    ("asked to stop, done anyway", Memory(stop="stop"), Outcome(reached=9, codes=frozenset({0})), "done", 0),
    ("asked to stop, killed", Memory(stop="stop"), Outcome(reached=9), "stopped", 85),
    ("a failure while stopping", Memory(stop="stop"), Outcome(reached=9, culprit=KILLED), "stopped", 85),
    ("cancelled", Memory(stop="cancel"), Outcome(reached=9, codes=frozenset({85})), "cancelled", 3),
    ("a worker killed", Memory(), Outcome(reached=5, culprit=KILLED), None, 0),
    ("a node lost", Memory(), Outcome(reached=5, culprit=LOST), None, 0),
    ("an exception", Memory(), Outcome(reached=5, culprit=error()), None, 0),
    ("the same exception again", SEEN, Outcome(reached=5, culprit=error()), "failed", 93),
    ("the same a step later", SEEN, Outcome(reached=6, culprit=error(step=6)), None, 0),
    ("another at the same step", SEEN, Outcome(reached=5, culprit=error(message="KeyError: 1")), None, 0),
    ("the same as a victim", SEEN, Outcome(reached=5, culprit=error(victim=True)), None, 0),
    ("never retry", Memory(), Outcome(reached=0, culprit=error(retry=False)), "failed", 93),
    ("stuck once more", STUCK, Outcome(reached=5, culprit=KILLED), None, 0),
    ("stuck too often", Memory(reached=5, stuck=3), Outcome(reached=5, culprit=KILLED), "failed", 1),
    ("stuck, then a step further", Memory(reached=5, stuck=3), Outcome(reached=6, culprit=KILLED), None, 0),
    ("stuck, then a commit", Memory(reached=5, stuck=3), Outcome(reached=5, committed=3, culprit=KILLED), None, 0),
    ("a damaged checkpoint", Memory(reached=50, stuck=3), Outcome(reached=0, culprit=CORRUPT), None, 0),
    (
        "the same damaged one",
        Memory(reached=50, stuck=3, skip=((40, 2),)),
        Outcome(reached=0, culprit=CORRUPT),
        "failed",
        1,
    ),
]


@pytest.mark.parametrize(
    ("memory", "outcome", "state", "code"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_decision(memory: Memory, outcome: Outcome, state: str | None, code: int) -> None:
    decision = decide(memory, outcome, max_stuck=3)
    assert (decision.state, decision.exit_code) == (state, code)
    assert decision.reason
    assert not decision.memory.running


@pytest.mark.parametrize(
    ("done", "from_step", "committed", "lost"),
    [(0, 0, 0, False), (1, 0, 0, True), (40, 40, 0, False), (41, 40, 0, True), (45, 40, 45, False), (46, 40, 45, True)],
)
def test_a_stop_that_went_wrong_speaks_of_lost_steps_only_where_some_are(
    done: int, from_step: int, committed: int, lost: bool
) -> None:
    outcome = Outcome(reached=done, done=done, from_step=from_step, committed=committed, culprit=KILLED)
    assert ("not saved" in decide(Memory(stop="stop"), outcome, max_stuck=3).reason) is lost


def test_addresses_in_a_message_do_not_make_it_another_exception() -> None:
    first = decide(Memory(), Outcome(reached=5, culprit=error(message="bad <A at 0x7f01>")), max_stuck=3)
    second = decide(first.memory, Outcome(reached=5, culprit=error(message="bad <A at 0x7f99>")), max_stuck=3)
    assert second.exit_code == 93


def test_progress_clears_the_count_and_a_damaged_checkpoint_does_not_count() -> None:
    def after(memory: Memory, reached: int, culprit: Fact) -> Decision:
        return decide(memory, Outcome(reached=reached, culprit=culprit), max_stuck=3)

    assert after(STUCK, 5, KILLED).memory.stuck == 3
    assert after(STUCK, 6, KILLED).memory.stuck == 0
    passed = after(STUCK, 0, CORRUPT).memory
    assert (passed.stuck, passed.skip) == (2, ((40, 2),))


def test_the_next_coordinator_reads_what_this_one_knew() -> None:
    memory = Memory(attempt=4, running=True, reached=7, stuck=1, signature="x", skip=((40, 2), (30, 1)), stop="cancel")
    assert Memory.from_json(json.loads(memory.to_json())) == memory


def test_the_reason_of_a_run_that_stopped_early_is_kept() -> None:
    outcome = Outcome(reached=9, codes=frozenset({0}), stopped_early="stopped early at step 8")
    assert (decide(Memory(), outcome, 3).state, decide(Memory(), outcome, 3).reason) == (
        "done",
        "stopped early at step 8",
    )


DISK = error(message="OSError: [Errno 5] Input/output error", node=1)
ONCE = Memory(reached=5, suspect=1, strikes=1)


@pytest.mark.parametrize(
    ("memory", "culprit", "nodes", "given_up"),
    [
        (Memory(), DISK, 2, None),
        (ONCE, DISK, 2, 1),
        (ONCE, replace(KILLED, node=1), 2, 1),
        (ONCE, LOST, 2, 1),
        (ONCE, KILLED, 2, None),  # another node
        (ONCE, error(node=1), 2, None),  # the code's own doing
        (ONCE, replace(DISK, victim=True), 2, None),
        (ONCE, DISK, 1, None),  # there is no other
        (replace(ONCE, blamed=5), DISK, 2, None),  # a node was given up for it, and that has not helped
        (replace(ONCE, blamed=4), DISK, 2, 1),
    ],
)
def test_a_node_that_fails_twice_in_a_row_is_given_up(
    memory: Memory, culprit: Fact, nodes: int, given_up: int | None
) -> None:
    decision = decide(memory, Outcome(reached=5, culprit=culprit, nodes=nodes), max_stuck=3)
    assert decision.state is None
    assert decision.give_up == given_up
    if given_up is not None:
        assert (decision.memory.strikes, decision.memory.suspect, decision.memory.blamed) == (0, None, 5)


def test_the_same_broken_disk_on_two_nodes_is_the_codes_doing() -> None:
    memory = Memory()
    for _ in range(2):
        memory = decide(memory, Outcome(reached=5, culprit=DISK, nodes=2), max_stuck=3).memory
    elsewhere = replace(DISK, node=0)
    memory = decide(memory, Outcome(reached=5, culprit=elsewhere, nodes=2), max_stuck=3).memory
    assert decide(memory, Outcome(reached=5, culprit=elsewhere, nodes=2), max_stuck=3).exit_code == 93
