"""Following a run: what reaches the screen from a run's files while real processes write them, and how it ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId, session_members
from dtrain.cluster.rundir import RunDir, append_event, put_end, read_json, write_atomic
from dtrain.launcher import pace
from dtrain.launcher.console import Said
from dtrain.launcher.departure import wait_until_gone
from dtrain.launcher.follow import Bookmark, RankZeroLines, RunView, _until_end, bookmark, follow
from dtrain.launcher.runs import Job, read_job
from dtrain.launcher.screen import PlainScreen, TerminalScreen
from dtrain.launcher.tail import JsonTail, LineTail

HEAD = """
import json, os, signal, sys, time
from dtrain.cluster.rundir import *
run = RunDir(sys.argv[1]); control = run.control("local-1")
def metric(step, attempt=1):
    record = {"step": step, "attempt": attempt, "loss": 5.0 - step / 100, "step_s": 0.01, "samples_per_s": 512.0}
    with open(run.metrics, "a") as file:
        file.write(json.dumps(record) + "\\n")
def printed(text, attempt=1):
    path = run.log(attempt, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"[0 10:00:00.000] {text}\\n[1 10:00:00.000] not of rank 0\\n")
def end(state, code, step, reason=""):
    append_event(run, "ended", state=state, exit_code=code, reason=reason, step=step)
    write_once(control.ended, json.dumps(dict(state=state, exit_code=code, reason=reason, step=step, at=1.0)))
print("up", flush=True)
"""

TRAINS = (
    HEAD
    + """
append_event(run, "node_joined", node=0)
append_event(run, "attempt_started", attempt=1, world_size=2, nodes=2, **{"from": None})
append_event(run, "workers_started", warm=True, seconds=0.2)
append_event(run, "chosen", lines=["strategy  ddp"])
printed("hello from the model")
for step in range(1, 101):
    metric(step)
    if step == 50:
        append_event(run, "checkpoint_committed", step=50, bytes=1000, seconds=0.1)
        time.sleep(0.5)
append_event(run, "result", text="a sample")
end("done", 0, 100)
"""
)
SAVES_ON_TERM = (
    HEAD
    + """
def stop(*_):
    append_event(run, "stopping", reason="asked to")
    end("stopped", 85, 7)
    sys.exit(85)
signal.signal(signal.SIGTERM, stop)
metric(1)
append_event(run, "attempt_started", attempt=1, world_size=2, nodes=2, **{"from": None})
time.sleep(60)
"""
)
DEAF = (
    HEAD
    + "signal.signal(signal.SIGTERM, signal.SIG_IGN); metric(6)\n"
    + "append_event(run, 'restart', reason='deaf'); time.sleep(60)"
)
DIES = HEAD + "metric(1); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"

HANGS = (
    HEAD
    + """
append_event(run, "attempt_started", attempt=1, world_size=2, nodes=1, **{"from": None})
for step in range(1, 10):
    metric(step)
workers = [dict(global_rank=0, phase="data"), dict(global_rank=1, phase="forward")]
write_atomic(control.status, json.dumps(dict(state="running", attempt=1, step=9, workers=workers, seen_at=1.0)))
time.sleep(4)
metric(10)
end("done", 0, 10)
"""
)

Start = Callable[[str], tuple[Job, subprocess.Popen[str]]]


def slow_clock() -> Callable[[], float]:
    """Two seconds or more pass between any two steps."""
    return itertools.count(0.0, 2.0).__next__


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "toy")


@pytest.fixture
def start(tmp_path: Path, run: RunDir) -> Iterator[Start]:
    """A run directory whose node 0 is a real process, which does what `body` says."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str) -> tuple[Job, subprocess.Popen[str]]:
        control = run.control("local-1")
        control.path.mkdir(parents=True)
        plan = JobPlan(
            name="toy", run_dir=str(run.path), job_id="local-1", backend="local", nodes=1, procs_per_node=1,
            gpus_per_node=0, threads_per_proc=1, python=sys.executable, argv=("dtrain", "launch", "toy.yaml"),
            cwd=str(tmp_path), sys_path=(), env={}, checkpoint_url=str(run.path / "checkpoints"), workers="warm",
            max_restarts_without_progress=3,
        )  # fmt: skip
        run.job.write_text(json.dumps({**plan.to_json(), "submitted_at": 1000.0, "steps": 100}))
        process = subprocess.Popen(
            [sys.executable, "-c", body, str(run.path)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        control.node(0).write_text(json.dumps(ProcessId.of(process.pid).to_json()))
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        job = read_job(run.path)
        assert job is not None
        return job, process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_golden_plain_output(start: Start, run: RunDir) -> None:
    job, _ = start(TRAINS)
    stream = io.StringIO()
    assert follow(job, PlainScreen(100, stream, slow_clock()), Bookmark()) == 0
    lines = [re.sub(r"  ETA .*", "", line) for line in stream.getvalue().splitlines()]
    assert lines.pop().startswith("  train on:    dtrain launch ")
    steps = {step: f"step {step:3}/100  loss {5 - step / 100:.4f}  512 samples/s" for step in [1, *range(5, 101, 5)]}
    assert lines == [
        "attempt 1: 2 nodes, 2 ranks, from the beginning",
        "workers started warm in 0.2 s",
        "  strategy  ddp",
        "hello from the model",
        *[line for step, line in steps.items() if step <= 50],
        "checkpoint of step 50 committed: 1.0 kB in 0.1 s",
        *[line for step, line in steps.items() if step > 50],
        "a sample",
        "done at step 100 of 100",
        f"  run dir      {run.path}",
        f"  checkpoints  {run.path}/checkpoints",
    ]


@pytest.mark.slow
def test_a_hang_is_said_once_and_again_after_twice_the_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE_S", 0.5)
    job, _ = start(HANGS)
    stream = io.StringIO()
    assert follow(job, PlainScreen(100, stream, slow_clock()), Bookmark()) == 0
    words = re.findall(r"no step for (.*) s: (.*)", stream.getvalue())
    where = "rank 0 in data, rank 1 in forward (dtrain stack toy shows where)"
    assert [text for _, text in words] == [where] * len(words)
    waits = [float(seconds) for seconds, _ in words]
    assert 0.5 <= waits[0] < 2
    assert 2 <= len(waits) <= 4
    assert all(later >= 1.8 * earlier for earlier, later in itertools.pairwise(waits))


@pytest.mark.slow
def test_the_run_dies_without_a_word(start: Start) -> None:
    job, _ = start(DIES)
    (job.run.path / "logs").mkdir()
    (job.run.path / "logs" / "agent-0.log").write_text("ImportError: no such module\n")
    stream = io.StringIO()
    assert follow(job, PlainScreen(100, stream), Bookmark()) == 85
    text = stream.getvalue()
    assert "every node of the run is gone" in text
    assert "  | ImportError: no such module" in text
    assert "continue from the beginning (no checkpoint was committed):  dtrain launch toy.yaml" in text


@pytest.mark.slow
def test_who_cancels_has_the_last_word(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel kills a run that does not end, and then puts its end down: a follower may see the first before."""
    monkeypatch.setattr("dtrain.launcher.follow.ASK_BACKEND_S", 0.2)
    job, node = start(DIES)
    job.control.cancel.touch()
    node.wait()
    words = "killed: it did not end within 10 s"
    end = partial(put_end, job.run, job.control, state="cancelled", exit_code=3, reason=words, step=1)
    later = threading.Timer(1.5, end)
    later.start()
    assert follow(job, PlainScreen(100, io.StringIO()), Bookmark()) == 3
    later.join()


def attach(job: Job, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dtrain.launcher.cli", "attach", str(job.run.path)]
    return subprocess.Popen(command, **options)


def read_until(descriptor: int, words: str, timeout_s: float = 120.0) -> str:
    """What came until `words` did; "" for the words: until the other end is closed."""
    text, deadline = "", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                chunk = os.read(descriptor, 65536)
            except OSError:
                chunk = b""  # a pseudo terminal whose last process has ended
            if not chunk:
                return text
            text += chunk.decode(errors="replace")
            if words and words in text:
                return text
    raise AssertionError(f"{words!r} did not come, but: {text}")


@pytest.mark.slow
def test_first_ctrl_c_saves_and_ends_with_85(start: Start) -> None:
    job, agent = start(SAVES_ON_TERM)
    follower = attach(job, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    said = read_until(follower.stdout.fileno(), "following;")
    time.sleep(0.3)
    follower.send_signal(signal.SIGINT)
    said += read_until(follower.stdout.fileno(), "")
    follower.stdout.close()
    assert follower.wait(timeout=90) == 85
    assert agent.wait(timeout=90) == 85
    assert "Ctrl-C: saving and stopping" in said
    assert "stopped at step 7 of 100: its state is saved" in said
    assert "continue:  dtrain launch toy.yaml" in said


@pytest.mark.slow
def test_second_ctrl_c_kills(start: Start) -> None:
    job, agent = start(DEAF)
    follower = attach(job, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    read_until(follower.stdout.fileno(), "following;")
    time.sleep(0.3)
    follower.send_signal(signal.SIGINT)
    read_until(follower.stdout.fileno(), "Ctrl-C: saving")
    assert agent.poll() is None
    follower.send_signal(signal.SIGINT)
    said = read_until(follower.stdout.fileno(), "")
    follower.stdout.close()
    assert follower.wait(timeout=90) == 130
    assert agent.wait(timeout=90) == -signal.SIGKILL
    assert "failed at step 6 of 100: killed by Ctrl-C (second time)" in said
    assert "without a word" not in said
    ended = read_json(job.control.ended)
    assert ended is not None
    assert (ended["state"], ended["reason"], ended["step"]) == ("failed", "killed by Ctrl-C (second time)", 6)


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_ctrl_c_kills_though_the_stop_before_it_was_not_seen_yet(start: Start, interrupts: list[int]) -> None:
    """Both come between two looks."""
    job, agent = start(DEAF)
    screen = PlainScreen(100, io.StringIO())
    assert _until_end(job, screen, RunView(job.run, screen, bookmark(job.run)), interrupts) == 130
    assert agent.wait(timeout=90) == -signal.SIGKILL


@pytest.mark.slow
def test_what_a_killed_worker_leaves_is_waited_for(start: Start) -> None:
    """A process of the agent's session that outlives it, as a loader's does that is busy in the kernel."""
    child = "import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1.5)'])\n"
    job, agent = start(child + HEAD + "time.sleep(60)")
    agent.kill()
    agent.wait()
    assert session_members(agent.pid)
    assert not wait_until_gone(job, timeout_s=0.1)
    assert wait_until_gone(job)
    assert not session_members(agent.pid)


@pytest.mark.slow
def test_killing_the_follower_leaves_the_run(start: Start) -> None:
    job, agent = start(SAVES_ON_TERM)
    follower = attach(job, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    read_until(follower.stdout.fileno(), "following;")
    follower.kill()
    follower.wait()
    follower.stdout.close()
    assert agent.poll() is None
    assert job.backend_state() == "alive"


@pytest.mark.slow
def test_attach_to_a_run_that_is_over_gives_its_exit_code(start: Start) -> None:
    job, agent = start(HEAD + "end('failed', 93, 7, 'the same error twice')")
    agent.wait(timeout=90)
    follower = attach(job, stdout=subprocess.PIPE)
    said = follower.communicate(timeout=90)[0].decode()
    assert follower.returncode == 93
    assert "toy: failed: the same error twice" in said


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_events_above_it(start: Start) -> None:
    body = (
        HEAD
        + """
while not os.path.exists(f"{run.path}/followed"):
    time.sleep(0.05)
for step in range(1, 101):
    metric(step)
    time.sleep(0.01)
    if step == 60:
        append_event(run, "restart", reason="[bold] is no markup")
time.sleep(0.5)
end("done", 0, 100)
"""
    )
    job, _ = start(body)
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    follower = attach(job, stdout=theirs, stderr=theirs, stdin=theirs, env=environ)
    os.close(theirs)
    said = read_until(ours, "toy")
    (job.run.path / "followed").touch()
    said += read_until(ours, "")
    os.close(ours)
    assert follower.wait(timeout=90) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert re.search(r"step \d+/100 \S*━\S* loss \d\.\d{4}  512 samples/s  ETA \d+\.\d s", plain)
    assert "step 100/100" in plain
    assert "restarting: [bold] is no markup" in plain
    assert plain.index("restarting") < plain.rindex("step 100/100") < plain.index("done at step 100 of 100")
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h")  # the cursor is shown again


def test_the_bar_says_when_no_step_comes_and_is_not_drawn_after_its_end() -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        screen = TerminalScreen(60, terminal)
        screen.metric({"step": 9, "attempt": 1, "loss": 1.0, "step_s": 0.1})
        screen.waiting(18.0, "no step for 18 s: rank 0 in data")
        time.sleep(0.4)
        screen.waiting(0.0, "")
        time.sleep(0.4)
        screen.close()
        screen.say(Said("the last words"))
        screen.close()
        terminal.flush()
        said = read_until(ours, "words")
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    waited = plain.index("no step for 18 s: rank 0 in data")
    assert "step 9/60" in plain[:waited]
    assert "ETA 5.1 s" in plain[waited:]
    assert plain.rstrip().endswith("the last words")


class TestView:
    def view(self, run: RunDir, since: Bookmark | None = None) -> tuple[RunView, io.StringIO]:
        run.path.mkdir(exist_ok=True)
        stream = io.StringIO()
        return RunView(run, PlainScreen(20, stream, slow_clock()), since or Bookmark()), stream

    def metrics(self, *places: tuple[int, int]) -> str:
        return "".join(json.dumps({"attempt": a, "step": s, "loss": 1.0}) + "\n" for a, s in places)

    def test_a_new_attempt_replaces_the_metrics(self, run: RunDir) -> None:
        view, stream = self.view(run)
        run.metrics.write_text(self.metrics((1, 1), (1, 2), (1, 3)))
        view.poll()
        with open(run.metrics, "a") as late:  # one more of the old attempt, not yet seen when the file is replaced
            late.write(self.metrics((1, 4)))
        write_atomic(run.metrics, self.metrics((1, 1), (1, 2), (2, 3)))
        view.poll()
        with open(run.metrics, "a") as file:
            file.write(self.metrics((2, 4)))
        view.poll()
        view.close()
        shown = [line.split()[1] for line in stream.getvalue().splitlines()]
        assert shown == ["1/20", "2/20", "3/20", "4/20", "3/20", "4/20"]

    def test_what_was_there_before_is_old_news(self, run: RunDir) -> None:
        run.path.mkdir()
        run.metrics.write_text(self.metrics((1, 1), (1, 2), (2, 2), (2, 3)))
        append_event(run, "restart", reason="old")
        view, stream = self.view(run, bookmark(run))
        append_event(run, "restart", reason="new")
        write_atomic(run.metrics, self.metrics((1, 1), (2, 2), (3, 3)))
        view.poll()
        view.close()
        assert stream.getvalue().splitlines() == ["step  3/20  loss 1.0000", "restarting: new"]

    def test_the_culprit_is_shown_and_not_rank_0s_own_traceback(self, run: RunDir) -> None:
        view, stream = self.view(run)
        append_event(run, "attempt_started", attempt=1, world_size=2, nodes=1, **{"from": None})
        run.log(1, 0).parent.mkdir(parents=True)
        trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "RuntimeError: peer lost"]
        lines = [
            "before",
            *trace,
            "",
            "During handling of the above exception, another exception occurred:",
            "",
            *trace,
        ]
        run.log(1, 0).write_text("".join(f"[0 10:00:00.000] {line}\n" for line in [*lines, "after"]))
        view.poll()
        append_event(run, "failure", kind="exception", global_rank=1, node=0, step=3, message="ValueError: x")
        view.poll()
        view.close()
        text = stream.getvalue()
        assert "peer lost" not in text
        assert "During handling" not in text
        assert text.index("before") < text.index("after") < text.index("FAILURE: rank 1")

    def test_a_message_is_said_once_through_a_restart(self, run: RunDir) -> None:
        view, stream = self.view(run)
        append_event(run, "failure", kind="exception", global_rank=1, node=0, step=3, message="ValueError: x")
        append_event(run, "restart", attempt=1, reason="rank 1: ValueError: x")
        origin = {"step": 2, "attempt": 1}
        append_event(run, "attempt_started", attempt=2, world_size=2, nodes=1, **{"from": origin})
        append_event(run, "restart", attempt=2, reason="the checkpoint of step 2 is damaged and is passed over")
        view.poll()
        view.close()
        assert stream.getvalue().splitlines() == [
            "FAILURE: rank 1 on node 0, step 3: raised an exception",
            "  ValueError: x",
            "restarting from step 2 (attempt 2): 1 node, 2 ranks",
            "restarting: the checkpoint of step 2 is damaged and is passed over",
        ]

    def test_a_choice_is_said_once(self, run: RunDir) -> None:
        view, stream = self.view(run)
        for lines in (["a"], ["a"], ["b"]):
            append_event(run, "chosen", lines=lines)
        view.poll()
        view.close()
        assert stream.getvalue().split() == ["a", "b"]


def test_a_traceback_without_a_failure_is_shown_in_the_end() -> None:
    lines = RankZeroLines()
    trace = ["[0 1] Traceback (most recent call last):", "[0 1]   File", "[0 1] KeyError: caught and logged"]
    assert lines.take(trace, now=0.0) == []
    assert lines.take(["[0 1] more"], now=1.0) == ["more"]
    assert lines.take([], now=9.0) == ["Traceback (most recent call last):", "  File", "KeyError: caught and logged"]


class TestTail:
    def test_lines_come_once_and_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        tail = LineTail(path)
        assert tail.poll() == []
        path.write_bytes(b"a\nb\rstill b\nhal")
        assert tail.poll() == ["a", "b\rstill b"]
        with open(path, "ab") as file:
            file.write(b"f\n")
        assert tail.poll() == ["half"]
        assert tail.poll() == []
        tail.close()

    def test_a_shortened_file_goes_on_at_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_text("a\n" * 50)
        tail = LineTail(path)
        assert len(tail.poll()) == 50
        path.write_text("a\nb\n")  # in place, as the bounded log does
        assert tail.poll() == []
        with open(path, "a") as file:
            file.write("c\n")
        assert tail.poll() == ["c"]
        tail.close()

    def test_torn_json_is_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_text('{"a": 1}\n{"b": \n3\n{"c": 2}\n')
        tail = JsonTail(path)
        assert tail.poll() == [{"a": 1}, {"c": 2}]
        tail.close()
