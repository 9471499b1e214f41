"""Copies of a run directory at a URL: who is first stays first, no line is lost or doubled whichever process dies
where, and what one side removes is gone on the other. Each copy is in a folder of its own; nothing runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.cluster import growing, mirror, rundir
from dtrain.cluster.mirror import Mirror
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import ObjectInfo

JOB = "job-1"
Copy = Callable[..., tuple[Mirror, RunDir]]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Copy]:
    """copy(name, node=True) -> a copy of the run, as another process has it."""
    url = f"file://{tmp_path}/store"

    def make(name: str, *, node: bool = True) -> tuple[Mirror, RunDir]:
        monkeypatch.delenv(mirror.VARIABLE, raising=False)
        if node:
            monkeypatch.setenv(mirror.VARIABLE, str(tmp_path / name))
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        run = RunDir(url)
        mirror._mirrors.pop((os.getpid(), str(run.path)), None)  # as a new process begins
        found = mirror.mirror_of(run.path)
        assert found is not None
        found.job_id = JOB
        run.control(JOB).path.mkdir(parents=True, exist_ok=True)
        run.log(1, 0).parent.mkdir(parents=True, exist_ok=True)
        return found, run

    yield make
    mirror._mirrors.clear()
    mirror._urls.clear()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_first_record_stays_and_everybody_has_it(copy: Copy) -> None:
    (_, one), (_, two) = copy("one"), copy("two")
    assert rundir.write_once(one.control(JOB).coordinator(1), "one", 0o600)
    assert not rundir.write_once(two.control(JOB).coordinator(1), "two", 0o600)
    assert two.control(JOB).coordinator(1).read_text() == "one"


def test_what_a_script_puts_down_is_sent_unless_another_was_first(copy: Copy) -> None:
    """A node's bash has only the copy: its end of the job counts if there is none."""
    (first, one), (second, two) = copy("one"), copy("two")
    for run, text in ((one, "one"), (two, "two")):
        run.control(JOB).ended.write_text(text)
    first.push()
    second.push()
    assert two.control(JOB).ended.read_text() == "one"


def test_a_newer_record_comes_and_one_not_sent_yet_stays(copy: Copy) -> None:
    (first, one), (second, two) = copy("one"), copy("two")
    rundir.write_atomic(one.control(JOB).status, "old")
    second.refresh()
    assert two.control(JOB).status.read_text() == "old"
    rundir.write_atomic(one.control(JOB).status, "new")
    two.control(JOB).status.write_text("own, not sent")
    second.refresh()
    assert two.control(JOB).status.read_text() == "own, not sent"
    second.push()
    first.refresh()
    assert one.control(JOB).status.read_text() == "own, not sent"


def test_what_is_removed_goes_everywhere_and_what_is_archived_has_its_new_name(copy: Copy) -> None:
    (_, one), (second, two) = copy("one"), copy("two")
    control, other = one.control(JOB), two.control(JOB)
    rundir.write_atomic(control.node(0), "{}")
    rundir.write_once(control.ended, "end")
    second.refresh()
    assert other.node(0).exists()
    assert other.ended.exists()
    rundir.remove(control.node(0))
    rundir.archive(control.ended, control.path / "ended-0000.json")
    second.refresh()
    assert not other.node(0).exists()
    assert not other.ended.exists()
    assert (other.path / "ended-0000.json").read_text() == "end"


def test_lines_of_several_writers_are_joined_each_once(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "PART_BYTES", 200)
    (first, one), (second, two), (client, here) = copy("one"), copy("two"), copy("here", node=False)
    expected = []
    for number in range(40):
        rundir.append_event((one, two, here)[number % 3], "tick", number=number)
        expected.append(number)
        if number % 7 == 0:
            client.refresh()
    first.push()
    second.push()
    client.refresh()
    found = [record["number"] for record in rundir.read_jsonl(here.events)]
    assert sorted(found) == expected
    again, elsewhere = copy("elsewhere", node=False)
    again.refresh()
    assert [record["number"] for record in rundir.read_jsonl(elsewhere.events)] == expected  # by time


def test_two_that_take_the_same_generation_lose_no_line(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "newest_generation", lambda store, name: 0)  # as both saw it
    (_, one), (_, two), (client, here) = copy("one"), copy("two"), copy("here", node=False)
    _, there = copy("there", node=False)
    for number, run in enumerate((one, here, two, there)):
        rundir.append_event(run, "tick", number=number)
    client.refresh()
    assert sorted(record["number"] for record in rundir.read_jsonl(here.events)) == [0, 1, 2, 3]


def test_a_line_that_is_half_there_is_not_joined_with_another_writers(copy: Copy) -> None:
    (first, one), (second, two), (client, here) = copy("one"), copy("two"), copy("here", node=False)
    for written, other, expected in (("a\nb", "c\n", ["a", "c"]), ("a\nbb\n", "c\nd\n", ["a", "bb", "c", "d"])):
        one.agent_log(0).write_text(written)
        two.agent_log(0).write_text(other)
        first.push()
        second.push()
        client.refresh()
        assert sorted(lines(here.agent_log(0))) == expected


def test_a_log_is_whole_whatever_its_writer_and_its_reader_forget(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies after it sent a part and before it knows so; a reader that dies after it wrote lines."""
    monkeypatch.setattr(growing, "PART_BYTES", 64)
    (node, run), (client, here) = copy("node"), copy("here", node=False)
    for name in (run.log(1, 0), run.agent_log(0)):
        name.write_text("".join(f"line {number} of {name.name}\n" for number in range(10)))
    node.push()
    state = run.path / ".mirror.json"
    known = state.read_text()
    client.refresh()
    forgotten = (here.path / ".mirror.json").read_text()
    for name in (run.log(1, 0), run.agent_log(0)):
        with open(name, "a") as file:
            file.write("".join(f"more {number} of {name.name}\n" for number in range(10)))
    node.push()
    client.refresh()
    state.write_text(known)
    (here.path / ".mirror.json").write_text(forgotten)
    node, run = copy("node")
    client, here = copy("here", node=False)
    node.push()
    client.refresh()
    for ours, theirs in ((run.log(1, 0), here.log(1, 0)), (run.agent_log(0), here.agent_log(0))):
        assert lines(theirs) == lines(ours)


def test_who_sees_the_end_has_all_that_was_written_before_it(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's last line and the end come while the reader looks, after the first of its two looks."""
    (node, run), (client, here) = copy("node"), copy("here", node=False)
    folder, look = f"control/{JOB}/", client.store.list

    def then_it_ends(prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(look(prefix))
        if prefix in ("logs/", folder) and not run.control(JOB).ended.exists():
            run.log(1, 0).write_text("the last line\n")
            node.push()
            rundir.write_once(run.control(JOB).ended, "end")
        return iter(found)

    monkeypatch.setattr(client.store, "list", then_it_ends)
    for _ in range(2):
        client.refresh()
        assert here.log(1, 0).exists() or not here.control(JOB).ended.exists()
    assert here.control(JOB).ended.exists()


def test_a_writer_that_died_over_its_first_part_goes_on_with_it(copy: Copy) -> None:
    node, run = copy("node")
    run.agent_log(0).write_text("one\n")
    node.push()
    state = run.path / ".mirror.json"
    record = json.loads(state.read_text())
    record["out"]["logs/agent-0.log"].update(claimed=False, size=0)
    state.write_text(json.dumps(record))
    node, run = copy("node")
    with open(run.agent_log(0), "a") as file:
        file.write("two\n")
    node.push()
    client, here = copy("here", node=False)
    client.refresh()
    assert lines(here.agent_log(0)) == ["one", "two"]


def test_rank_0_goes_on_elsewhere_with_the_steps_before(copy: Copy) -> None:
    """The file is replaced by each attempt: of two nodes' files the newer one counts."""
    (first, one), (second, two) = copy("one"), copy("two")
    one.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    first.push()
    second.fetch_growing("metrics.jsonl")
    assert lines(two.metrics) == ['{"step": 1}', '{"step": 2}']
    second.push()  # what came is not sent back: it would count as newer than its writer's
    assert growing.newest_generation(second.store, "metrics.jsonl") == 1
    rundir.write_atomic(two.metrics, '{"step": 1}\n')
    second.push()
    with open(two.metrics, "a") as file:
        file.write('{"step": 2, "attempt": 2}\n')
    second.push()
    client, here = copy("here", node=False)
    client.refresh()
    assert lines(here.metrics) == ['{"step": 1}', '{"step": 2, "attempt": 2}']
    first.fetch_growing("metrics.jsonl")
    assert lines(one.metrics) == lines(here.metrics)
    before = lines(two.metrics)
    second.fetch_growing("metrics.jsonl")  # its own are the newest: they stay
    assert lines(two.metrics) == before
    with open(two.metrics, "a") as file:
        file.write('{"step": 3}\n')
    second.push()
    client.refresh()
    assert lines(here.metrics) == [*before, '{"step": 3}']


@pytest.mark.parametrize(
    "case", ["nobody has used it", "used since", "written since", "a record not sent", "a log of its own"]
)
def test_a_copy_goes_when_nobody_has_used_it_for_a_month(copy: Copy, tmp_path: Path, case: str) -> None:
    """Another run is looked at then. Nothing goes that the store has not."""
    client, run = copy("here", node=False)
    rundir.write_atomic(run.job, json.dumps({"job_id": JOB}))
    rundir.append_event(run, "tick")
    client.refresh()
    if case == "a record not sent":
        run.control(JOB).status.write_text("own")
    if case == "a log of its own":
        run.agent_log(0).write_text("own")
    month_ago = time.time() - 31 * 86400
    for path in (path for path in run.path.rglob("*") if path.is_file()):
        known = path.stat()
        os.utime(path, (month_ago, month_ago))
        if path.name not in (".lock", ".mirror.json"):  # the copy's own word of the file stays true
            state = run.path / ".mirror.json"
            state.write_text(state.read_text().replace(str(known.st_mtime_ns), str(path.stat().st_mtime_ns)))
    if case == "written since":
        os.utime(run.events)
    if case == "used since":
        client.refresh()
    rundir.refresh(RunDir(f"file://{tmp_path}/another").path)
    assert run.path.exists() == (case != "nobody has used it")
    assert not list(run.path.parent.glob("*.gone"))
    copy("here", node=False)[0].refresh()
    assert [record["type"] for record in rundir.read_jsonl(run.events)] == ["tick"]
