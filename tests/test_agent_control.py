"""The control port: who is let in, what is refused, and that a stranger learns and breaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir
from dtrain.runtime import control
from dtrain.runtime.channel import Channel, accept, connect
from dtrain.runtime.control import MAX_HELLO_BYTES, ControlError, CoordinatorAddress
from dtrain.runtime.options import Timings
from dtrain.runtime.roster import _MAX_STRANGERS, Roster

TOKEN = secrets.token_bytes(32)
TIMINGS = Timings(heartbeat_s=0.1, dead_after_s=1.0, handshake_s=1.0)
OWN = ProcessId.of(os.getpid())


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A roster that serves in a thread of its own."""

    run_dir: Path
    number: int
    roster: Roster
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.number), timeout=5)

    def call(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    files = RunDir(tmp_path).control("job")
    files.path.mkdir(parents=True)
    files.token.write_text(TOKEN.hex())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def answer(message: dict[str, Any]) -> dict[str, Any]:
        return {"status": {"asked": message["op"]}}

    async def start() -> tuple[Roster, int]:
        roster = Roster(files, TOKEN, 2, TIMINGS, answer)
        return roster, await roster.open("127.0.0.1")

    roster, number = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    address = CoordinatorAddress(term=1, node_rank=0, host="here", addr="127.0.0.1", port=number, pid=1)
    files.coordinator(1).write_text(address.to_json())
    yield Port(run_dir=tmp_path, number=number, roster=roster, loop=loop)
    asyncio.run_coroutine_threadsafe(roster.close(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def rest(connection: socket.socket) -> bytes:
    """Until the other side hangs up."""
    data = b""
    try:
        while part := connection.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def hello(node_rank: object = 1, process: ProcessId = OWN) -> dict[str, Any]:
    return {"op": "hello", "node_rank": node_rank, "process": process.to_json()}


def test_a_client_with_the_token_is_answered(port: Port) -> None:
    assert control.request(str(port.run_dir), "job", "status") == {"status": {"asked": "status"}}


def test_a_wrong_token_is_refused_on_both_sides(port: Port) -> None:
    RunDir(port.run_dir).control("job").token.write_text(secrets.token_hex(32))
    with pytest.raises(ControlError, match="token"):
        control.request(str(port.run_dir), "job", "stop")
    with pytest.raises(ControlError, match="token"):
        port.call(lambda: connect("127.0.0.1", port.number, secrets.token_bytes(32), 2.0))


def test_the_token_never_crosses_the_wire() -> None:
    for role in ("client", "server"):
        proof = control.prove(TOKEN, role, "a", "b")
        assert TOKEN.hex() not in proof
    assert control.prove(TOKEN, "client", "a", "b") != control.prove(TOKEN, "server", "a", "b")
    assert control.prove(TOKEN, "client", "a", "b") != control.prove(TOKEN, "client", "c", "b")


def test_an_impostor_on_the_coordinators_port_learns_and_gets_nothing(tmp_path: Path) -> None:
    files = RunDir(tmp_path).control("job")
    files.path.mkdir(parents=True)
    files.token.write_text(TOKEN.hex())
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impersonate() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b'{"challenge": "x"}\n')
                heard.append(peer.recv(4096))
                peer.sendall(b'{"proof": "made up"}\n')
                heard.append(rest(peer))

        thread = threading.Thread(target=impersonate)
        thread.start()
        address = CoordinatorAddress(
            term=1, node_rank=0, host="here", addr="127.0.0.1", port=server.getsockname()[1], pid=1
        )
        files.coordinator(1).write_text(address.to_json())
        with pytest.raises(ControlError, match="does not hold the run's token"):
            control.request(str(tmp_path), "job", "stop", timeout_s=5)
        thread.join()
    assert TOKEN.hex().encode() not in b"".join(heard)
    assert heard[1] == b""  # no request was sent


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[1, 2]\n",
        b"{}\n",
        b'{"challenge": "x", "proof": 5}\n',
        b"\xff\xfe\n",
        b"GET / HTTP/1.1\r\n",
        b"[" * 4000 + b"\n",
        b"x" * (MAX_HELLO_BYTES + 1000),
        b"y" * 3_000_000,
    ],
    ids=lambda line: f"{line[:12]!r}x{len(line)}",
)
def test_a_stranger_is_hung_up_on(port: Port, line: bytes) -> None:
    with port.connect() as connection:
        with contextlib.suppress(OSError):  # it may hang up before all is sent
            connection.sendall(line)
        said = rest(connection)
    assert b"proof" not in said
    assert port.roster.inbox.empty()
    assert control.request(str(port.run_dir), "job", "status")["status"]  # and it goes on serving


def test_no_more_than_a_line_is_read_of_a_stranger() -> None:
    ours, theirs = socket.socketpair()
    kept = ours.dup()
    ours.setblocking(False)
    theirs.setblocking(False)
    sent = theirs.send(b"x" * 100_000)
    with kept, theirs:
        assert asyncio.run(accept(ours, TOKEN, 5.0)) is None
        left = len(kept.recv(sent, socket.MSG_PEEK))
    assert sent - left <= MAX_HELLO_BYTES + 1


def test_more_strangers_than_are_heard_at_once_only_wait(port: Port) -> None:
    strangers = [port.connect() for _ in range(_MAX_STRANGERS + 10)]
    try:
        assert control.request(str(port.run_dir), "job", "status")["status"]
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_silent_stranger_is_hung_up_on(port: Port) -> None:
    with port.connect() as connection:
        assert set(json.loads(rest(connection))) == {"challenge"}


async def _join(port: Port, message: dict[str, Any]) -> tuple[Channel, dict[str, Any] | None]:
    channel = await connect("127.0.0.1", port.number, TOKEN, 2.0)
    channel.send(message)
    return channel, await channel.receive()


def test_a_node_joins_speaks_and_is_missed(port: Port) -> None:
    async def life() -> list[tuple[int, dict[str, Any]]]:
        channel, answer = await _join(port, hello())
        assert answer == {"op": "welcome"}
        channel.send({"op": "started"})
        channel.close()
        return [await asyncio.wait_for(port.roster.inbox.get(), 5) for _ in range(3)]

    assert [(node, message["op"]) for node, message in port.call(life)] == [(1, "joined"), (1, "started"), (1, "lost")]


def test_a_silent_node_is_dropped(port: Port) -> None:
    async def life() -> tuple[int, dict[str, Any]]:
        channel, _ = await _join(port, hello())
        await port.roster.inbox.get()
        lost = await asyncio.wait_for(port.roster.inbox.get(), 5)
        channel.close()
        return lost

    node, message = port.call(life)
    assert (node, message["op"]) == (1, "lost")
    assert "nothing heard" in message["reason"]


@pytest.mark.parametrize(
    "message",
    [hello(7), hello("one"), {"op": "hello"}, {"op": "hello", "node_rank": 1, "process": {"pid": "x"}}],
    ids=["no such node", "no number", "empty", "no process"],
)
def test_an_improper_hello_is_refused(port: Port, message: dict[str, Any]) -> None:
    async def life() -> dict[str, Any] | None:
        channel, answer = await _join(port, message)
        channel.close()
        return answer

    assert "error" in (port.call(life) or {})
    assert port.roster.inbox.empty()


def test_a_node_in_whose_place_another_was_started_is_refused(port: Port) -> None:
    other = {**OWN.to_json(), "pid": OWN.pid + 1}
    RunDir(port.run_dir).control("job").node(1).write_text(json.dumps(other))

    async def life() -> dict[str, Any] | None:
        channel, answer = await _join(port, hello())
        channel.close()
        return answer

    assert (port.call(life) or {})["op"] == "refused"
    assert not port.roster.members


def test_nobody_to_ask(tmp_path: Path) -> None:
    files = RunDir(tmp_path).control("job")
    files.path.mkdir(parents=True)
    with pytest.raises(ControlError, match="no node has become"):
        control.request(str(tmp_path), "job", "stop")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    address = CoordinatorAddress(term=1, node_rank=0, host="here", addr="127.0.0.1", port=free, pid=1)
    files.coordinator(1).write_text(address.to_json())
    with pytest.raises(ControlError, match="Is the run still going on"):
        control.request(str(tmp_path), "job", "stop")


def test_the_newest_term_counts(tmp_path: Path) -> None:
    files = RunDir(tmp_path).control("job")
    files.path.mkdir(parents=True)
    assert control.find_coordinator(files) is None
    for term in (1, 2, 10, 9, 10_000):
        address = CoordinatorAddress(term=term, node_rank=0, host="h", addr="a", port=1, pid=1)
        files.coordinator(term).write_text(address.to_json())
    newest = control.find_coordinator(files)
    assert newest is not None
    assert newest.term == 10_000


def test_a_log_on_a_full_disk_ends_nothing() -> None:
    program = (
        "import sys; sys.stderr = open('/dev/full', 'w', buffering=1)\n"
        "from dtrain.runtime import agent, coordinator\n"
        "agent._say('x'); coordinator._say_unwritten(OSError(28, 'No space left on device')); agent._say('y')\n"
        "import os; os._exit(7)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 7
