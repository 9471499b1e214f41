"""One agent and what it does beside its orders: it goes on listening, and a store that hangs does not hold it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from toyjob import toy_plan

from dtrain.cluster.errors import StorageError, UsageError
from dtrain.cluster.interfaces import LOOPBACK
from dtrain.cluster.local import LocalBackend
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.runtime.agent import Agent
from dtrain.runtime.background import in_background
from dtrain.runtime.channel import connect
from dtrain.runtime.checkpoint.attempts import Attempt
from dtrain.runtime.control import encode
from dtrain.runtime.coordinator import Coordinator, Job
from dtrain.runtime.mirroring import Mirroring
from dtrain.runtime.options import Options, Timings
from dtrain.runtime.roster import Roster
from dtrain.runtime.stackcalls import shorten

TIMINGS = Timings(heartbeat_s=0.1, dead_after_s=0.6, handshake_s=1.0)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    files = RunDir(tmp_path).control("job")
    files.path.mkdir(parents=True)
    files.token.write_text(secrets.token_hex(32))
    files.node(0).write_text(json.dumps(ProcessId.of(os.getpid()).to_json()))
    return Options(run_dir=str(tmp_path), job_id="job", node_rank=0, timings=TIMINGS)


def make_job(options: Options, claim: Any) -> Job:
    plan = toy_plan(Path(options.run_dir), job_id="job")
    token = bytes.fromhex(RunDir(options.run_dir).control("job").token.read_text())
    return Job(plan=plan, backend=LocalBackend(), interface=LOOPBACK, token=token, timings=TIMINGS, claim=claim)


async def nobody(message: dict[str, Any]) -> dict[str, Any]:
    return {}


def never(skip: frozenset[tuple[int, int]], from_nothing: bool) -> Attempt:
    raise AssertionError("nobody asked for an attempt")


def test_an_agent_that_takes_long_to_end_its_workers_goes_on_listening(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(options, never)
    seen: list[str] = []

    async def scene() -> None:
        roster = Roster(RunDir(options.run_dir).control("job"), job.token, 1, TIMINGS, nobody)
        port = await roster.open("127.0.0.1")
        agent = Agent(job, options)

        async def slow_kill() -> None:
            await asyncio.sleep(3 * TIMINGS.dead_after_s)

        monkeypatch.setattr(agent._workers, "kill", slow_kill)
        channel = await agent._introduce(await connect("127.0.0.1", port, job.token, 1.0))
        serving = asyncio.create_task(agent._serve(channel))
        roster.send(0, {"op": "kill", "attempt": 1})
        while "killed" not in seen:
            _, message = await asyncio.wait_for(roster.inbox.get(), 10)
            seen.append(message["op"])
        roster.broadcast({"op": "end", "exit_code": 85})
        assert await asyncio.wait_for(serving, 10) == 85
        channel.close()
        await roster.close()

    asyncio.run(scene())
    assert "lost" not in seen


def test_the_end_of_an_attempt_is_told_when_its_lines_are_in_the_store(options: Options) -> None:
    """For who reads the run directory in a bucket: after the end nothing more comes."""
    job = make_job(options, never)
    said: list[str] = []

    class Slow(Mirroring):
        def flush(self, timeout_s: float) -> bool:
            time.sleep(0.3)
            said.append("sent")
            return True

    async def scene() -> None:
        roster = Roster(RunDir(options.run_dir).control("job"), job.token, 1, TIMINGS, nobody)
        port = await roster.open("127.0.0.1")
        agent = Agent(job, options, mirroring=Slow(options))
        channel = await agent._introduce(await connect("127.0.0.1", port, job.token, 1.0))
        serving = asyncio.create_task(agent._serve(channel))
        roster.send(0, {"op": "kill", "attempt": 1})
        while "killed" not in said:
            said.append((await asyncio.wait_for(roster.inbox.get(), 10))[1]["op"])
        roster.broadcast({"op": "end", "exit_code": 85})
        assert await asyncio.wait_for(serving, 10) == 85
        channel.close()
        await roster.close()

    asyncio.run(scene())
    assert [word for word in said if word in ("sent", "killed")] == ["sent", "killed"]


def test_a_stop_is_not_held_up_by_a_store_that_does_not_answer(options: Options) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(skip: frozenset[tuple[int, int]], from_nothing: bool) -> Attempt:
        asked.set()
        answer.wait(20)
        return Attempt(number=1, from_step=0, from_attempt=0)

    job = make_job(options, hang)

    async def scene() -> None:
        coordinator = Coordinator(job, 1)
        address = await coordinator.open(0, "here")
        running = asyncio.create_task(coordinator.run())
        agent = Agent(job, options)
        channel = await agent._introduce(await connect(address.addr, address.port, job.token, 1.0))
        serving = asyncio.create_task(agent._serve(channel))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        channel.send({"op": "stop_requested", "reason": "test", "count": 1})
        assert await asyncio.wait_for(serving, 5) == 85
        channel.close()
        await asyncio.wait_for(running, 5)

    try:
        asyncio.run(scene())
    finally:
        answer.set()
    ended = read_json(RunDir(options.run_dir).control("job").ended)
    assert ended is not None
    assert (ended["state"], ended["exit_code"]) == ("stopped", 85)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (StorageError("the bucket is gone"), 1, "the bucket is gone"),
        (UsageError("no store for gopher://"), 93, "no store for gopher://"),
        (ZeroDivisionError("oops"), 1, "an error inside dtrain: ZeroDivisionError('oops'); see logs/agent-*.log"),
    ],
)
def test_a_store_that_fails_ends_the_job_with_its_own_words(
    options: Options, error: Exception, code: int, reason: str
) -> None:
    def fail(skip: frozenset[tuple[int, int]], from_nothing: bool) -> Attempt:
        raise error

    job = make_job(options, fail)

    async def scene() -> None:
        coordinator = Coordinator(job, 1)
        address = await coordinator.open(0, "here")
        running = asyncio.create_task(coordinator.run())
        agent = Agent(job, options)
        channel = await agent._introduce(await connect(address.addr, address.port, job.token, 1.0))
        assert await asyncio.wait_for(agent._serve(channel), 5) == code
        channel.close()
        await asyncio.wait_for(running, 5)

    asyncio.run(scene())
    ended = read_json(RunDir(options.run_dir).control("job").ended)
    assert ended is not None
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("failed", code, reason)


def test_stacks_of_many_ranks_fit_into_a_message() -> None:
    texts = {str(rank): "\n".join(f"line {number}" for number in range(10_000)) for rank in range(100)}
    short = shorten({**texts, "100": "idle"}, 1 << 20)
    assert short["100"] == "idle"
    assert len(encode(short)) < 1.2 * (1 << 20)
    assert short["0"].startswith("line 0\n")
    assert short["0"].endswith("line 9999")
    assert "characters left out" in short["0"]


def test_work_in_the_background_gives_its_result_its_error_or_is_given_up() -> None:
    release = threading.Event()

    def fail() -> None:
        raise OSError("no disk")

    async def scene() -> None:
        assert await in_background(lambda: 7) == 7
        with pytest.raises(OSError, match="no disk"):
            await in_background(fail)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_background(release.wait), 0.05)

    started = time.monotonic()
    asyncio.run(scene())
    assert time.monotonic() - started < 5  # the loop ended though the work goes on
    release.set()
