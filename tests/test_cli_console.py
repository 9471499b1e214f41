"""What a person reads: numbers, events, failures, the last words, the command that continues."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest

from dtrain.launcher.console import (
    MAX_EVIDENCE_LINES,
    continue_command,
    duration,
    event_lines,
    metric_line,
    outcome_lines,
    plain_interval,
    rate,
    size,
    without_message,
)
from dtrain.launcher.pace import Pace, is_work, stall_words
from dtrain.launcher.screen import PlainScreen


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.24, "0.2 s"), (9, "9.0 s"), (59.4, "59 s"), (80, "1m 20s"), (3700, "1h 01m"), (3e5, "3d 11h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_size_and_rate() -> None:
    assert [size(n) for n in (12, 12_300_000, 5.1e12)] == ["12 B", "12.3 MB", "5.10 TB"]
    assert [rate(n) for n in (3.14159, 512, 12_345, 2.5e6)] == ["3.14", "512", "12.3k", "2.50M"]


@pytest.mark.parametrize("steps", [20, 37, 50, 100, 300, 1000, 4321, 10_000, 1_000_000])
def test_a_run_has_20_to_35_plain_lines(steps: int) -> None:
    assert 17 <= steps // plain_interval(steps) <= 37


def test_metric_line() -> None:
    record = {"step": 20, "attempt": 1, "loss": 2.71304, "lr": 3e-4, "tokens_per_s": 12_345.0, "samples_per_s": 9.0}
    assert metric_line(record, 300, 80.0) == "step  20/300  loss 2.7130  lr 3.0e-04  12.3k tokens/s  ETA 1m 20s"
    nan = {"step": 300, "loss": None, "nonfinite": {"loss": "nan"}, "samples_per_s": 512.0}
    assert metric_line(nan, 300, 0.0) == "step 300/300  loss nan  512 samples/s"


EVENTS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"type": "attempt_started", "attempt": 1, "world_size": 4, "nodes": 2, "from": None},
        ["attempt 1: 2 nodes, 4 ranks, from the beginning"],
    ),
    (
        {"type": "attempt_started", "attempt": 2, "world_size": 1, "nodes": 1, "from": {"step": 50, "attempt": 1}},
        ["attempt 2: 1 node, 1 rank, from step 50"],
    ),
    ({"type": "workers_started", "warm": True, "seconds": 0.21}, ["workers started warm in 0.2 s"]),
    ({"type": "chosen", "lines": ["strategy  ddp", "batch     32"]}, ["  strategy  ddp", "  batch     32"]),
    (
        {"type": "resumed", "step": 50, "from_attempt": 1, "strategy": "ddp", "world_size": 3},
        ["continues after step 50, saved in attempt 1 by ddp on 3 ranks"],
    ),
    (
        {"type": "checkpoint_committed", "step": 50, "bytes": 9_600_000, "seconds": 0.31},
        ["checkpoint of step 50 committed: 9.6 MB in 0.3 s"],
    ),
    (
        {"type": "checkpoint_passed_over", "step": 50, "message": "w0.safetensors is damaged"},
        ["checkpoint of step 50 passed over: w0.safetensors is damaged"],
    ),
    ({"type": "checkpoint_failed", "message": "disk full"}, ["checkpoint failed: disk full"]),
    ({"type": "evaluated", "step": 100, "metrics": {"loss": 2.5}}, ["evaluated at step 100: loss 2.5000"]),
    ({"type": "restart", "reason": "rank 1 died"}, ["restarting: rank 1 died"]),
    ({"type": "node_lost", "node": 1}, ["node 1 is lost"]),
    ({"type": "stopping", "reason": "SIGTERM"}, ["stopping: SIGTERM"]),
    ({"type": "result", "text": "def f():\n    pass"}, ["def f():", "    pass"]),
    ({"type": "submitted", "job_id": "x"}, []),
    ({"type": "of_a_later_version", "anything": 1}, []),
    ({}, []),
]


@pytest.mark.parametrize(("event", "lines"), EVENTS)
def test_events(event: dict[str, Any], lines: list[str]) -> None:
    assert [said.text for said in event_lines(event)] == lines


FAILURE = {
    "type": "failure",
    "kind": "exception",
    "global_rank": 1,
    "node": 0,
    "step": 37,
    "phase": "backward",
    "message": "ValueError: bad sample [/bold]",
    "where": "train.py:12",
    "evidence": ["Traceback (most recent call last):", '  File "train.py", line 12, in f', "ValueError: bad sample"],
    "collateral": [0, 2, 3],
}


def test_a_failure_names_the_culprit_first() -> None:
    assert [said.text for said in event_lines(FAILURE)] == [
        "FAILURE: rank 1 on node 0, step 37, in backward: raised an exception",
        "  ValueError: bad sample [/bold]",
        "  at train.py:12",
        "  | Traceback (most recent call last):",
        '  |   File "train.py", line 12, in f',
        "  | ValueError: bad sample",
        "  brought down with it: ranks 0, 2, 3",
    ]


def test_a_lost_node_has_no_rank() -> None:
    lost = {
        "type": "failure",
        "kind": "node_lost",
        "global_rank": None,
        "node": 1,
        "step": 3,
        "message": "no word for 5 s",
    }
    assert event_lines(lost)[0].text == "FAILURE: node 1, step 3: the node was lost"


@pytest.mark.parametrize(
    ("last", "shown"),
    [
        (["ValueError: bad"], []),
        (["some.DataError: ValueError: bad"], []),
        (["bad"], []),  # as in `sample 5 of data.train: ValueError: bad` before the user's own `ValueError: bad`
        (["KeyError: another"], ["  | KeyError: another"]),
    ],
)
def test_a_traceback_does_not_say_the_message_again(last: list[str], shown: list[str]) -> None:
    failure = {**FAILURE, "message": "ValueError: bad", "evidence": ["Traceback", *last], "collateral": []}
    assert [said.text for said in event_lines(failure)][3:] == ["  | Traceback", *shown]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("signal", "killed by a signal"),
        ("exception", "raised an exception"),
        ("nonfinite", "the loss or gradient is not finite"),
        ("config", "the configuration does not fit"),
        ("corrupt_checkpoint", "a damaged checkpoint"),
        ("exit", "ended early"),
        ("of_a_later_version", "of_a_later_version"),
    ],
)
def test_a_failure_says_in_words_what_happened(kind: str, words: str) -> None:
    assert event_lines({**FAILURE, "kind": kind})[0].text.endswith(f"in backward: {words}")


def test_after_the_last_step_no_step_is_named() -> None:
    after = {**FAILURE, "step": 0, "phase": "finishing"}
    assert "rank 1 on node 0, in on_end after the last step: raised" in event_lines(after)[0].text
    killed = {**after, "where": "", "kind": "signal"}
    assert "rank 1 on node 0, after the last step: killed" in event_lines(killed)[0].text


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("rank 1: ValueError: bad. Starting again would fail again", "starting again would fail again"),
        ("the same exception twice at step 5: ValueError: bad\nsecond line", "the same exception twice at step 5"),
        (
            "4 attempts in a row without a new step; the last one: rank 1: ValueError: bad",
            "4 attempts in a row without a new step",
        ),
        (
            "stopped on request; its last steps were not saved: rank 1: ValueError: bad",
            "stopped on request; its last steps were not saved",
        ),
        ("the same exception twice at step 0: ValueError: bad\nsecond line", "the same exception twice"),
        ("rank 1: ValueError: bad", ""),
        ("node 1 was lost", "node 1 was lost"),
    ],
)
def test_a_reason_does_not_say_the_message_again(reason: str, short: str) -> None:
    assert without_message(reason, {"message": "ValueError: bad\nsecond line"}) == short
    assert without_message(reason, None) == reason


def test_long_evidence_keeps_its_end() -> None:
    evidence = [f"line {i}" for i in range(500)]
    shown = [said.text for said in event_lines({**FAILURE, "evidence": evidence})]
    assert len(shown) < MAX_EVIDENCE_LINES + 10
    assert "  | line 0" in shown
    assert "  | line 499" in shown
    assert any("left out" in line for line in shown)


@pytest.mark.parametrize(
    ("argv", "cwd", "command"),
    [
        (["dtrain", "launch", "a.yaml"], "/w", "dtrain launch a.yaml"),
        (["dtrain", "launch", "--nodes", "3", "a.yaml", "x=[1, 2]"], "/w", "dtrain launch --nodes 3 a.yaml 'x=[1, 2]'"),
        (["dtrain", "launch", "--detach", "--continue-changed", "a.yaml"], "/w", "dtrain launch a.yaml"),
        (["dtrain", "launch", "a.yaml"], "/else where", "cd /w && dtrain launch a.yaml"),
        (["dtrain", "launch", "--fresh", "a.yaml"], "/w", "dtrain launch a.yaml --name n-2 --run-dir /r/n-2"),
        (
            ["dtrain", "launch", "--fresh", "--name", "n", "a.yaml", "--run-dir=/r/n"],
            "/w",
            "dtrain launch a.yaml --name n-2 --run-dir /r/n-2",
        ),
        (["dtrain", "launch", "--name", "n", "a.yaml"], "/w", "dtrain launch --name n a.yaml"),
    ],
)
def test_the_command_that_continues(argv: list[str], cwd: str, command: str) -> None:
    assert continue_command(argv, "/w", cwd, name="n-2", run_dir="/r/n-2") == command


def test_last_words() -> None:
    def words(**ended: Any) -> str:
        lines = outcome_lines(ended, steps=300, run_dir="/r", url="file:///r/c", again="dtrain launch a.yaml")
        return "\n".join(said.text for said in lines)

    assert words(state="done", exit_code=0, step=300, reason="") == (
        "done at step 300 of 300\n  run dir      /r\n  checkpoints  file:///r/c\n"
        "  train on:    dtrain launch a.yaml train.steps=600"
    )
    assert words(state="stopped", exit_code=85, step=37, reason="SIGTERM").startswith(
        "stopped at step 37 of 300: SIGTERM"
    )
    assert words(state="failed", exit_code=1, step=37, reason="x").endswith("\n  continue:  dtrain launch a.yaml")
    assert words(state="failed", exit_code=93, step=37, reason="x").endswith(
        "fix the cause, then continue:  dtrain launch a.yaml"
    )


def test_plain_screen_shows_first_round_and_last_steps_of_each_attempt() -> None:
    stream = io.StringIO()
    screen = PlainScreen(300, stream, clock=itertools.count().__next__)  # about a second a step
    for attempt, steps in ((1, range(1, 156)), (2, range(152, 301))):
        for step in steps:
            screen.metric({"step": step, "attempt": attempt, "loss": 1.0, "step_s": 0.5})
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, *range(10, 151, 10), 152, *range(160, 301, 10)]
    assert "ETA 2m 15s" in stream.getvalue().splitlines()[3]


def test_plain_lines_of_quick_steps_are_two_seconds_apart() -> None:
    stream, now = io.StringIO(), [0.0]
    screen = PlainScreen(300, stream, clock=lambda: now[0])
    for step in range(1, 301):
        now[0] += 0.03
        screen.metric({"step": step, "attempt": 1, "loss": 1.0})
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 70, 140, 210, 280, 300]


def test_pace_is_patient_with_slow_steps() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    now[0] = 10.5
    assert pace.overdue_s() == 10.5
    for _ in range(3):
        pace.saw({"step_s": 4.0})
    assert pace.overdue_s() is None
    now[0] = 41.0
    assert pace.overdue_s() == 41.0
    pace.restart()
    assert pace.overdue_s() is None


def test_many_ranks_in_a_stall() -> None:
    workers = [{"global_rank": rank, "phase": "forward" if rank else "data"} for rank in range(20)]
    words = "no step for 18 s: {} (dtrain stack n shows where)"
    assert stall_words(18.0, workers, "n") == words.format("rank 0 in data, 19 ranks in forward")
    assert stall_words(18.0, workers[:3], "n") == words.format("rank 0 in data, ranks 1, 2 in forward")
    assert stall_words(18.0, [], "n") == words.format("no worker is there")


def test_an_evaluation_may_be_long_a_step_may_not() -> None:
    evaluating, waiting = {"phase": "evaluating"}, {"phase": "waiting"}
    assert is_work(18.0, [evaluating, evaluating])
    assert not is_work(18.0, [evaluating, waiting])
    assert not is_work(180.0, [evaluating, evaluating])
    assert not is_work(18.0, [])


def test_plain_screen_does_not_stay_silent_when_steps_are_slow() -> None:
    stream, now = io.StringIO(), [0.0]
    screen = PlainScreen(300, stream, clock=lambda: now[0])
    for step in (1, 2, 3, 4):
        now[0] += 45.0
        screen.metric({"step": step, "attempt": 1, "loss": 1.0})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/300", "3/300"]
