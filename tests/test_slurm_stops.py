"""What a Slurm job does at its end, and when it begins to stop: every case a line of a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir
from dtrain.slurm.badnodes import bad_nodes, excluded, lost_in, note_bad, note_text
from dtrain.slurm.records import JobRecord, parse_scontrol
from dtrain.slurm.stopping import SaveTimes, limit_line
from dtrain.slurm.stops import Facts, count_stalled, decide_end, is_backstop, lead_s, stop_time

NOW = 1_000_000.0
RUNNING = JobRecord(job_id=17, state="RUNNING", ends_at=NOW + 9000)
NEAR = replace(RUNNING, ends_at=NOW + 40)
COMPLETING = JobRecord(job_id=17, state="COMPLETING", ends_at=NOW - 1)
PREEMPTED = replace(RUNNING, preempted_at=NOW - 2, ends_at=NOW + 3)


def facts(**more: object) -> Facts:
    known: dict[str, object] = {
        "exit_code": exits.STOPPED, "on_stop": "requeue", "restart": 0, "record": RUNNING, "now": NOW,
    }  # fmt: skip
    return Facts(**{**known, **more})  # type: ignore[arg-type]


TABLE = {
    "done": (facts(exit_code=0), "finish", 0, "ended"),
    "failed": (facts(exit_code=1), "finish", 1, "ended"),
    "never again": (facts(exit_code=93), "finish", 93, "ended"),
    "the time limit": (facts(record=NEAR), "requeue", 85, "time limit"),
    "a person's signal": (facts(), "requeue", 85, "on request"),
    "the limit, too late": (facts(record=replace(COMPLETING, reason="TimeLimit")), "requeue", 85, "time limit"),
    "preempted, within the grace": (facts(record=PREEMPTED), "requeue", 85, "preempted"),
    "preempted by cancelling": (facts(record=replace(COMPLETING, preempted_at=NOW)), "requeue", 85, "preempted"),
    "preempted, Slurm requeues": (facts(record=replace(COMPLETING, restarts=1)), "leave", 85, "Slurm has put"),
    "second time": (facts(record=replace(RUNNING, restarts=1), restart=1), "requeue", 85, ""),
    "a node failed, Slurm does not": (facts(record=replace(COMPLETING, reason="NodeDown")), "requeue", 85, "node"),
    "scancel": (facts(record=COMPLETING), "finish", 85, "scancel"),
    "scancel, already over": (facts(record=replace(COMPLETING, state="CANCELLED")), "finish", 85, "scancel"),
    "dtrain cancel": (facts(cancelled=True), "finish", 3, "cancelled"),
    "dtrain cancel at the limit": (facts(cancelled=True, record=NEAR), "finish", 3, "cancelled"),
    "on_stop none": (facts(on_stop="none"), "finish", 85, "on_stop: none"),
    "on_stop none, Slurm does it": (
        facts(on_stop="none", record=replace(COMPLETING, restarts=1)), "leave", 85, "Slurm has",
    ),
    "on_stop resubmit": (facts(on_stop="resubmit"), "resubmit", 85, "on request"),
    "requeue forbidden": (facts(record=replace(NEAR, may_requeue=False)), "resubmit", 85, "Requeue=0"),
    "a lost node": (facts(lost="node3: can't be reached"), "resubmit", 85, "node3"),
    "a lost node, on_stop none": (facts(lost="node3: x", on_stop="none"), "finish", 85, "none"),
    "no step further": (facts(stalled=4), "finish", 1, "4 starts in a row"),
    "not yet": (facts(stalled=3), "requeue", 85, ""),
    "Slurm is silent": (facts(record=None), "requeue", 85, "on request"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_every_end(case: str) -> None:
    given, action, code, words = TABLE[case]
    ending = decide_end(given)
    assert (ending.action, ending.exit_code) == (action, code)
    assert words in ending.reason


def test_only_a_job_without_a_lost_node_waits_for_its_predecessor() -> None:
    assert decide_end(facts(on_stop="resubmit")).waits
    assert not decide_end(facts(lost="node3: gone")).waits, "Slurm may take minutes to see that the old one is over"


def test_the_lead_follows_the_slowest_save() -> None:
    assert lead_s(0.0) == lead_s(7.5) == 30.0
    assert lead_s(100.0) == 215.0
    assert stop_time(NOW, 100.0) == NOW - 215
    assert stop_time(None, 100.0) is None


@pytest.mark.parametrize(
    ("signal", "own", "record", "expected"),
    [
        ("SIGUSR1", None, replace(RUNNING, ends_at=NOW + 119), True),
        ("SIGUSR1", None, replace(RUNNING, ends_at=NOW + 179), True),  # a minute early, says sbatch(1)
        ("SIGUSR1", None, RUNNING, False),
        ("SIGTERM", None, NEAR, False),
        ("SIGUSR1", "B:USR1@100", NEAR, False),
        ("SIGUSR1", None, PREEMPTED, False),
        ("SIGUSR1", None, None, False),
    ],
)
def test_the_signal_of_our_own_header_is_a_reminder(
    signal: str, own: str | None, record: JobRecord | None, expected: bool
) -> None:
    assert is_backstop(signal, own, record, NOW) is expected


def test_starts_without_progress_are_counted_unless_preempted() -> None:
    state = (0, 0)
    for step, preempted, expected in [(5, False, (5, 0)), (5, False, (5, 1)), (5, True, (5, 1)), (5, False, (5, 2))]:
        state = count_stalled(state, step, preempted=preempted)
        assert state == expected
    assert count_stalled(state, 6, preempted=False) == (6, 0)


def test_a_record_tells_of_preemption_and_excluded_nodes() -> None:
    line = (
        "JobId=17 JobName=a UserId=ada(1) GroupId=ada(1) JobState=RUNNING Reason=None PreemptEligibleTime=Unknown "
        "PreemptTime=2026-11-22T17:00:00 ReqNodeList=(null) ExcNodeList=node[3-4] Command=/x WorkDir=/"
    )
    (record,) = parse_scontrol(line)
    assert record.preempted_at is not None
    assert record.excluded == "node[3-4]"
    (other,) = parse_scontrol(line.replace("2026-11-22T17:00:00", "None").replace("node[3-4]", "(null)"))
    assert (other.preempted_at, other.excluded) == (None, "")


def test_a_node_that_fails_twice_is_excluded_with_its_reason(tmp_path: Path) -> None:
    control = RunDir(tmp_path).control("j")
    control.path.mkdir(parents=True)
    note_bad(control, "node3", "can't be reached", 1)
    note_bad(control, "node3", "did not join", 1)
    known = bad_nodes(control)
    assert lost_in(known, 1) == "node3: can't be reached", "once a start"
    assert lost_in(known, 2) == ""
    assert excluded(known, ["node9"], 5) == ["node9"]
    assert note_text(known) == ""
    note_bad(control, "node3", "did not join", 2)
    known = bad_nodes(control)
    assert excluded(known, ["node9"], 5) == ["node9", "node3"]
    assert excluded(known, ["node3"], 1) == ["node3"], "what we asked Slurm for before is not the user's wish"
    assert excluded(known, [], 0) == [], "better a bad node than none"
    assert note_text(known) == "without node3, which failed 2 times: did not join"
    note_bad(control, "node5", "failed 2 times in a row", 2, alive=True)
    assert excluded(bad_nodes(control), [], 5) == ["node3", "node5"]
    note_bad(control, "node4", "can't be reached", 3, went_on=True)
    assert lost_in(bad_nodes(control), 3) == "", "the job has gone on with the others; its end has another reason"


def test_saves_are_measured_as_they_come(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    times = SaveTimes(events)
    times.update()
    assert times.slowest_s == 0.0
    events.write_text('{"type": "checkpoint_committed", "seconds": 2.5}\n{"type": "checkpoint_committed", "sec')
    times.update()
    assert times.slowest_s == 2.5
    with open(events, "a") as file:
        file.write('onds": 4.0}\n{"type": "checkpoint_committed", "seconds": null}\n{"type": "other", "seconds": 9}\n')
    times.update()
    assert times.slowest_s == 4.0
    assert limit_line(None, 4.0) == "this Slurm job has no time limit"
    assert limit_line(NOW, 20.0).startswith("stops 55 s before the time limit at ")
