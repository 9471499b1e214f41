"""The pure decisions of the command line: what a launch does with a run that exists, and what state a run is in."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.launcher.identity import Existing, decide
from dtrain.launcher.state import STARTING_S, Facts, derive


def existing(
    state: str, step: int = 40, changed: tuple[str, ...] = (), others: tuple[str, ...] = (), early: str = ""
) -> Existing:
    return Existing(
        job_id="local-1", state=state, step=step, identity_lines=changed, other_lines=others, stopped_early=early
    )


CHANGED = ("model.width: 128 -> 256",)

DECISIONS = [
    # what is there,                         steps, checkpoint, --continue-changed -> action
    (None, 100, None, False, "start"),
    (None, 100, 50, False, "continue"),
    (existing("running"), 100, 20, False, "refuse"),
    (existing("pending"), 100, None, False, "refuse"),
    (existing("stopping"), 100, 20, False, "refuse"),
    (existing("running"), 100, 20, True, "refuse"),
    (existing("running", changed=CHANGED), 100, 20, True, "refuse"),
    (existing("unknown"), 100, 20, False, "refuse"),
    (existing("unknown", changed=CHANGED), 100, 20, True, "refuse"),
    (existing("failed"), 100, 20, False, "continue"),
    (existing("failed"), 100, None, False, "continue"),
    (existing("failed", step=0, changed=CHANGED), 100, None, False, "continue"),  # the mistake was put right
    (existing("failed", changed=CHANGED), 100, 20, False, "refuse"),
    (existing("stopped", changed=CHANGED), 100, None, False, "refuse"),
    (existing("stopped"), 100, 40, False, "continue"),
    (existing("cancelled"), 100, 40, False, "continue"),
    (existing("stopped", changed=CHANGED), 100, 40, False, "refuse"),
    (existing("stopped", changed=CHANGED), 100, 40, True, "continue"),
    (existing("done", step=100), 100, 100, False, "done"),
    (existing("done", step=100), 60, 100, False, "done"),
    (existing("done", step=100), 200, 100, False, "continue"),
    (existing("done", step=100, changed=CHANGED), 100, 100, False, "refuse"),
    (existing("done", step=100, changed=CHANGED), 100, 100, True, "done"),
    (existing("done", step=100, changed=CHANGED), 200, 100, True, "continue"),
    (
        existing("failed", step=100),
        100,
        100,
        False,
        "continue",
    ),  # the last step is saved, what comes after it is not done
    (existing("stopped", step=150), 100, 150, False, "done"),
    (existing("done", step=60, early="stopped early at step 60"), 100, 60, False, "done"),
    (existing("done", step=60, early="stopped early at step 60"), 200, 60, False, "done"),
    (existing("done", step=60), 100, 60, False, "continue"),  # another rule of train.early_stop is asked for
]


@pytest.mark.parametrize(("there", "steps", "checkpoint", "changed", "action"), DECISIONS)
def test_launch_on_a_run_directory(
    there: Existing | None, steps: int, checkpoint: int | None, changed: bool, action: str
) -> None:
    found = decide(there, steps_asked=steps, checkpoint_step=checkpoint, continue_changed=changed)
    assert found.action == action
    assert found.lines or action in ("start", "continue")


def test_a_refusal_names_the_difference_and_the_ways_out() -> None:
    found = decide(existing("stopped", changed=CHANGED), steps_asked=100, checkpoint_step=40, continue_changed=False)
    words = "\n".join(found.lines)
    assert all(word in words for word in ("model.width: 128 -> 256", "--continue-changed", "--fresh", "--name"))


def test_a_corrected_config_begins_anew_where_nothing_was_saved() -> None:
    there = existing("failed", step=0, changed=CHANGED)
    found = decide(there, steps_asked=100, checkpoint_step=None, continue_changed=False)
    assert found.lines == ("the run before failed at step 0 and saved nothing", "differs: model.width: 128 -> 256")
    script = decide(there, steps_asked=None, checkpoint_step=None, continue_changed=False)
    assert script.action == "refuse"  # what a script has saved, nobody else knows


def test_continuing_prints_what_else_differs() -> None:
    there = existing("stopped", others=("cluster.nodes: 2 -> 3",))
    found = decide(there, steps_asked=100, checkpoint_step=40, continue_changed=False)
    assert found.lines == ("differs: cluster.nodes: 2 -> 3",)


RUNNING = {"state": "running", "seen_at": 990.0, "reason": ""}
ENDED = {"state": "done", "exit_code": 0, "reason": "", "step": 100, "at": 995.0}

STATES: list[tuple[dict[str, Any] | None, dict[str, Any] | None, str, float, str]] = [
    # ended, status, back end, seconds since the submission -> state
    (ENDED, RUNNING, "gone", 100, "done"),
    (ENDED, RUNNING, "alive", 100, "done"),  # the agents are on their way out
    (ENDED, None, "unknown", 100, "done"),
    ({**ENDED, "state": "stopped"}, RUNNING, "gone", 100, "stopped"),
    (None, RUNNING, "alive", 100, "running"),
    (None, {**RUNNING, "state": "stopping"}, "alive", 100, "stopping"),
    (None, None, "alive", 100, "pending"),
    (None, RUNNING, "gone", 100, "failed"),
    (None, RUNNING, "gone", 0, "failed"),
    (None, None, "gone", STARTING_S + 1, "failed"),
    (None, None, "gone", 0, "pending"),
    (None, RUNNING, "unknown", 100, "unknown"),
    (None, None, "unknown", 0, "unknown"),
]


STOPPED = {**ENDED, "state": "stopped", "exit_code": 85, "step": 7, "reason": "time limit"}

SAVED = {**RUNNING, "state": "stopped", "reason": "asked to"}

OF_A_SCHEDULER: list[tuple[dict[str, Any] | None, dict[str, Any] | None, str, str, str, str]] = [
    # ended, status, back end, its words -> state, reason
    (STOPPED, RUNNING, "alive", "waits for Resources", "requeued", "waits for Resources"),
    (STOPPED, RUNNING, "gone", "COMPLETED", "stopped", "time limit"),
    (STOPPED, RUNNING, "unknown", "no answer", "unknown", "no answer; last seen stopped"),
    (ENDED, RUNNING, "alive", "RUNNING", "done", ""),
    (None, None, "alive", "waits for Priority", "pending", "waits for Priority"),
    (None, RUNNING, "alive", "", "running", ""),
    (None, SAVED, "alive", "", "requeued", "its nodes are being started again"),
    (None, SAVED, "alive", "waits for Prolog", "requeued", "waits for Prolog"),
    (None, RUNNING, "unknown", "no answer", "unknown", "no answer; last seen running"),
    (None, RUNNING, "gone", "Slurm ended it: OUT_OF_MEMORY", "failed", "Slurm ended it: OUT_OF_MEMORY"),
]


@pytest.mark.parametrize(("ended", "status", "backend", "words", "state", "reason"), OF_A_SCHEDULER)
def test_state_of_a_run_that_a_scheduler_may_start_again(
    ended: dict[str, Any] | None, status: dict[str, Any] | None, backend: str, words: str, state: str, reason: str
) -> None:
    facts = Facts(
        ended=ended, status=status, backend=backend, words=words, restarts=True, submitted_at=900.0, now=1000.0
    )
    found = derive(facts)
    assert (found.state, found.reason) == (state, reason)
    assert found.is_over == (state in ("done", "failed", "stopped"))


@pytest.mark.parametrize(("ended", "status", "backend", "age", "state"), STATES)
def test_state_of_a_run(
    ended: dict[str, Any] | None, status: dict[str, Any] | None, backend: str, age: float, state: str
) -> None:
    found = derive(Facts(ended=ended, status=status, backend=backend, submitted_at=1000 - age, now=1000.0))
    assert found.state == state
    assert found.is_over == (state in ("done", "failed", "stopped", "cancelled"))
    if status is not None and ended is None:
        assert found.seen_at == 990.0
    if state == "failed":
        assert "all nodes died" in found.reason
