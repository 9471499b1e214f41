"""How worker processes are started, and what of their words reaches log and coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from toyjob import toy_plan

from dtrain.cluster.errors import CorruptCheckpoint, FencedError, UsageError
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import open_storage
from dtrain.launcher.commands.logs import LineParser
from dtrain.runtime.background import in_background
from dtrain.runtime.nodelog import LineSplitter, NodeLog
from dtrain.runtime.nodeworkers import NodeWorkers, StartOrder
from dtrain.runtime.options import Options
from dtrain.runtime.report import MAX_LINE_BYTES, Reporter, find_place, is_victim

ORDER = StartOrder(attempt=1, master_addr="127.0.0.1", master_port=1, resume_step=40, resume_attempt=3, nodes=(0,))


class Node:
    """One node's workers without agent or coordinator. `body` is the worker's main, with `env` at hand."""

    def __init__(self, tmp_path: Path, body: str, *, workers: Literal["warm", "exec"], preload: str = "") -> None:
        module = f"worker_{abs(hash(body)) % 10**9}"
        text = "import json, os, signal, sys, threading, time\n\ndef main(env):\n" + textwrap.indent(body, "    ")
        (tmp_path / f"{module}.py").write_text(text)
        changes = {"procs_per_node": 2, "sys_path": (str(tmp_path),), "env": {"TOY": "from the plan"}}
        plan = toy_plan(tmp_path, workers=workers, **changes)
        self.messages: list[dict[str, Any]] = []
        self.log = RunDir(tmp_path).log(1, 0)
        names = tuple(name for name in preload.split(",") if name)
        options = Options(run_dir=str(tmp_path), job_id="toy-1", node_rank=0, entry=f"{module}:main", preload=names)
        self.workers = NodeWorkers(plan, options, self.messages.append)

    def printed(self) -> list[str]:
        """The workers' lines in the log so far, without the one that says the date."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.startswith("[date ")]

    def told(self, op: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["op"] == op]

    async def all_ended(self) -> list[dict[str, Any]]:
        await until(lambda: len(self.told("exited")) == 2)
        return sorted(self.told("exited"), key=lambda message: int(message["global_rank"]))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def play(tmp_path: Path, body: str, scene: Callable[[Node], Awaitable[None]], **how: Any) -> Node:
    async def run() -> Node:
        node = Node(tmp_path, body, **{"workers": "warm", **how})
        try:
            await scene(node)
        finally:
            await node.workers.close()
        return node

    return asyncio.run(run())


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_a_worker_finds_its_world(tmp_path: Path, workers: str) -> None:
    body = """\
        record = {"rank": env.global_rank, "from": [env.resume_step, env.resume_attempt], "toy": os.environ["TOY"],
                  "omp": os.environ["OMP_NUM_THREADS"], "cwd": os.getcwd(), "comm": open("/proc/self/comm").read(),
                  "term": type(signal.getsignal(signal.SIGTERM)).__name__, "same": os.environ["RANK"],
                  "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}
        print(json.dumps(record))
        return 85 if env.global_rank else 0
    """

    async def scene(node: Node) -> None:
        assert (await node.workers.start(ORDER, None))["warm"] is (workers == "warm")
        ended = await node.all_ended()
        assert [(message["code"], message["signal"], message["killed"]) for message in ended] == [
            (0, 0, False),
            (85, 0, False),
        ]

    node = play(tmp_path, textwrap.dedent(body), scene, workers=workers)
    lines = sorted(node.printed())
    records = [json.loads(line.partition("] ")[2]) for line in lines]
    assert records[1] == {
        "rank": 1,
        "from": [40, 3],
        "toy": "from the plan",
        "omp": os.environ.get("OMP_NUM_THREADS", "1"),
        "cwd": str(tmp_path),
        "comm": "dtrain-1/2\n",
        "term": "StopFlag",
        "same": "1",
        "blocked": [],
    }


def test_each_worker_has_cores_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        allowed *= 2  # one core: both workers keep it
    half = len(allowed) // 2

    async def scene(node: Node) -> None:
        await node.workers.start(ORDER, None)
        await node.all_ended()

    node = play(tmp_path, "print(sorted(os.sched_getaffinity(0)))\nreturn 0", scene)
    printed = {line[1]: json.loads(line.partition("] ")[2]) for line in node.printed()}
    assert printed == {"0": allowed[:half], "1": allowed[half : 2 * half]}


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_a_stop_during_the_start_is_neither_lost_nor_fatal(tmp_path: Path, workers: str) -> None:
    body = """\
        from dtrain.runtime.stopflag import stop_flag
        while not stop_flag().is_set():
            time.sleep(0.01)
        return 85
    """

    async def scene(node: Node) -> None:
        starting = asyncio.ensure_future(node.workers.start(ORDER, None))
        while not starting.done():
            await asyncio.sleep(0)
        node.workers.terminate()  # they have run for no time at all
        ended = await asyncio.wait_for(node.all_ended(), 10)
        assert [(message["code"], message["signal"]) for message in ended] == [(85, 0), (85, 0)]

    play(tmp_path, textwrap.dedent(body), scene, workers=workers)


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_the_last_words_of_a_killed_worker_arrive(tmp_path: Path, workers: str) -> None:
    body = "print('half a line', end='', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"

    async def scene(node: Node) -> None:
        await node.workers.start(ORDER, None)
        ended = await node.all_ended()
        assert [message["signal"] for message in ended] == [9, 9]
        assert ended[0]["evidence"] == ["half a line"]

    assert "half a line" in play(tmp_path, body, scene, workers=workers).log.read_text()


def test_an_entry_that_does_not_import_is_reported(tmp_path: Path) -> None:
    async def scene(node: Node) -> None:
        await node.workers.start(ORDER, None)
        await node.all_ended()
        report = node.told("failure")[0]["report"]
        assert report["message"] == "ModuleNotFoundError: No module named 'not_there'"
        assert "worker_" in report["where"]

    play(tmp_path, "import not_there", scene)


def test_a_warm_parent_with_threads_does_not_fork(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )

    async def scene(node: Node) -> None:
        assert (await node.workers.start(ORDER, None))["warm"] is False
        assert [message["code"] for message in await node.all_ended()] == [0, 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        play(tmp_path, "return 0", scene, preload="threaded")
    assert "2 threads" in capfd.readouterr().err


def test_a_warm_parent_whose_imports_fail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def scene(node: Node) -> None:
        assert (await node.workers.start(ORDER, None))["warm"] is False
        await node.all_ended()

    play(tmp_path, "return 0", scene, preload="not_there")
    assert "No module named 'not_there'" in capfd.readouterr().err


def test_a_dead_warm_parent_takes_the_workers_along_and_is_replaced(tmp_path: Path) -> None:
    async def scene(node: Node) -> None:
        await node.workers.start(ORDER, None)
        parent = next(child for child in psutil.Process().children() if _alive(child.pid) and _is_warm(child))
        forked = parent.children()
        assert len(forked) == 2
        os.kill(parent.pid, signal.SIGKILL)
        assert [message["signal"] for message in await node.all_ended()] == [9, 9]
        psutil.wait_procs(forked, timeout=60)
        await node.workers.kill()
        assert (await node.workers.start(ORDER, None))["warm"] is True

    play(tmp_path, "time.sleep(600)", scene)


def test_a_forked_child_of_a_worker_dies_with_it(tmp_path: Path) -> None:
    body = "child = os.fork()\nif child == 0:\n    time.sleep(600)\nprint(child, flush=True)\ntime.sleep(600)"

    async def scene(node: Node) -> None:
        await node.workers.start(ORDER, None)
        await until(lambda: len(node.printed()) == 2)
        children = [int(line.split()[-1]) for line in node.printed()]
        for record in node.workers.progress():
            os.kill(record["pid"], signal.SIGKILL)
        await until(lambda: not any(_alive(pid) for pid in children))

    play(tmp_path, body, scene)


def _is_warm(process: psutil.Process) -> bool:
    return "dtrain.runtime.forkserver" in process.cmdline()


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_kill_during_the_start_leaves_nobody(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")

    async def scene(node: Node) -> None:
        starting = asyncio.ensure_future(node.workers.start(ORDER, None))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(node.workers.kill(), 5)
        with pytest.raises(Exception, match="ended while"):
            await starting

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert not play(tmp_path, "return 0", scene, preload="slow").told("exited")


def test_a_log_keeps_head_and_tail(tmp_path: Path) -> None:
    log = NodeLog(tmp_path / "logs" / "node-0.log", max_bytes=10_000)
    for number in range(2000):
        log.write("0", b"line %d" % number)
        assert (tmp_path / "logs" / "node-0.log").stat().st_size <= 10_200
    log.close()
    lines = (tmp_path / "logs" / "node-0.log").read_text().splitlines()
    assert lines[0].startswith("[date 20")
    assert lines[1].endswith("] line 0")
    assert lines[-1].endswith("] line 1999")
    assert sum("left out" in line for line in lines) >= 1
    assert all(line.startswith("[") for line in lines)


def test_a_log_says_on_which_day_its_times_are(tmp_path: Path) -> None:
    """Also when the line that said so is among those left out."""
    path = tmp_path / "node-0.log"
    log = NodeLog(path, max_bytes=10_000)
    first_day = 1_800_000_000.0
    for number in range(1000):
        log.write("0", b"line %d" % number, first_day + (number >= 250) * 86400 + number)
    log.close()
    lines = list(LineParser().parse(path.read_text().splitlines()))
    times = {line.text.partition("] ")[2]: line.time_s for line in lines}
    assert times["line 0"] == first_day
    assert "line 250" not in times
    assert times["line 999"] == first_day + 86400 + 999


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ([b"one\ntwo\n"], [b"one", b"two"]),
        ([b"on", b"e\ntw", b"o"], [b"one", b"two"]),
        ([b"a\n\nb\n"], [b"a", b"", b"b"]),
        ([b"dos\r\n"], [b"dos"]),
        ([b"10%\r20%\r", b"30%\r", b"100%\ndone\n"], [b"100%", b"done"]),
        ([b"\r10%", b"\r20%", b"\r100%\n"], [b"100%"]),
        ([b"\r10%\r20%"], [b"20%"]),
        ([b"x" * 150_000 + b"\n"], [b"x" * 65536, b"x" * 65536, b"x" * 18928]),
        ([b"y" * 70_000], [b"y" * 65536, b"y" * 4464]),
    ],
)
def test_lines(parts: list[bytes], lines: list[bytes]) -> None:
    seen: list[bytes] = []
    splitter = LineSplitter(seen.append, clock=lambda: 0.0)
    for part in parts:
        splitter.feed(part)
    splitter.finish()
    assert seen == lines


def test_a_progress_bar_is_seen_now_and_then() -> None:
    seen: list[bytes] = []
    now = [0.0]
    splitter = LineSplitter(seen.append, clock=lambda: now[0])
    for percent in range(100):
        now[0] += 0.1
        splitter.feed(b"%d%%\r" % percent)
    assert 8 <= len(seen) <= 11


def test_reports_and_a_reader_that_is_gone() -> None:
    reading, writing = os.pipe()
    reporter = Reporter(writing)
    reporter.event("checkpoint_committed", step=3)
    try:
        raise CorruptCheckpoint("damaged", step=4, attempt=2, file="f", tensor="t")
    except CorruptCheckpoint as error:
        reporter.failure(error, step=9, phase="restoring")
    reporter.event("huge", text="x" * 2 * MAX_LINE_BYTES)
    lines = [json.loads(line) for line in os.read(reading, 1 << 20).splitlines()]
    assert lines[0] == {"type": "event", "event": {"type": "checkpoint_committed", "step": 3}}
    assert (lines[1]["kind"], lines[1]["data"]["step"], lines[1]["step"]) == ("corrupt_checkpoint", 4, 9)
    assert lines[1]["retry"] is True
    assert lines[2]["event"]["type"] == "report_too_long"
    os.close(reading)
    reporter.event("nobody listens")
    os.close(writing)
    Reporter(-1).failure(FencedError("newer"))


@pytest.mark.parametrize(
    ("error", "victim"),
    [
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (type("DistNetworkError", (RuntimeError,), {})("whatever"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("Connection closed by peer"), False),
        (UsageError("no"), False),
    ],
)
def test_victims(error: BaseException, victim: bool) -> None:
    assert is_victim(error) is victim


def evidence_of(error: BaseException) -> list[str]:
    reading, writing = os.pipe()
    with open(reading) as lines:
        Reporter(writing).failure(error)
        os.close(writing)
        evidence: list[str] = json.loads(lines.readline())["evidence"]
        return evidence


def test_the_evidence_begins_with_the_users_frames() -> None:
    """What failed is called by dtrain, which is called by the user's code once more below."""

    def user_code() -> object:
        try:
            return json.loads("{")
        except ValueError as error:
            raise KeyError("weights") from error

    with pytest.raises(KeyError) as caught:
        asyncio.run(_await_through_us(user_code))
    trace = caught.value.__traceback__
    while trace is not None and "background" not in trace.tb_frame.f_code.co_filename:
        trace = trace.tb_next  # as in a worker, where the outermost frame is ours
    lines = evidence_of(caught.value.with_traceback(trace))
    text = "\n".join(lines)
    assert "background.py" not in text
    assert "of dtrain left out)" in text
    assert f'File "{__file__}"' in text
    assert "JSONDecodeError" in text
    assert lines[-1] == "KeyError: 'weights'"


async def _await_through_us(work: Callable[[], object]) -> object:
    return await in_background(work)


def test_an_error_that_we_raise_on_purpose_has_the_users_frames_only() -> None:
    with pytest.raises(UsageError) as caught:
        open_storage("gopher://x")
    text = "\n".join(evidence_of(caught.value))
    assert f'File "{__file__}"' in text
    assert "storage.py" not in text
    assert "dtrain.cluster.errors" not in text
    trace = caught.value.__traceback__
    assert trace is not None
    assert evidence_of(caught.value.with_traceback(trace.tb_next)) == []


def test_the_place_is_in_the_users_code() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert find_place(caught.value.__traceback__).startswith(__file__)
