"""A proxy between an S3 client and its server that does what networks and busy servers do, by a seeded schedule.

    with FaultProxy(server.endpoint, Schedule(seed=7, rate=0.1)) as proxy: ...   # clients go to proxy.endpoint

Whether a request meets a fault depends on the seed, on its method and key, and on how often that was asked before: not
on how threads happen to take turns. Bodies are held in memory: for small objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

FAULTS = (
    "503",  # the server is busy, and did nothing
    "429",
    "500",  # the server failed after it had done what was asked
    "reset_request",  # the connection ends in the middle of the request's body
    "reset_reply",  # done by the server; the connection ends in the middle of the reply
    "lost_reply",  # done by the server; the client sees a reset and no reply
    "stall",  # nothing happens until the client gives up
    "stall_reply",  # done by the server; half of the reply comes, and no more
    "late",  # the client sees a reset, and the server does it a little later, perhaps after the client's next try
)
LATE_S = 0.2
MOST = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`rate`: the share of tries that meet a fault, one of `faults`; at most `MOST` of the same request. `broken`: the
    share of requests that meet the same fault however often they are tried."""

    seed: int
    rate: float
    broken: float = 0.0
    faults: Sequence[str] = FAULTS

    def fault(self, method: str, key: str, count: int) -> str | None:
        """`count`: how often this was asked before."""
        always = random.Random(f"{self.seed} {method} {key}")
        if always.random() < self.broken:
            return always.choice(self.faults)
        now = random.Random(f"{self.seed} {method} {key} {count}")
        return now.choice(self.faults) if count < MOST and now.random() < self.rate else None

    def read(self, fault: str | None) -> None:
        """A request that meets `fault` has come whole, and nothing was done yet."""


NO_FAULTS = Schedule(seed=0, rate=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    method: str
    target: str
    head: bytes
    length: int

    @property
    def key(self) -> str:
        """The target without upload ids, which no seed decides."""
        parts = urlsplit(self.target)
        query = sorted(word.partition("=")[0] if "uploadId" in word else word for word in parts.query.split("&"))
        return f"{parts.path}?{'&'.join(query)}" if parts.query else parts.path


class FaultProxy:
    """Serves on its own thread until the block ends. `log` says which requests met which fault."""

    def __init__(self, upstream: str, schedule: Schedule = NO_FAULTS, late_s: float = LATE_S) -> None:
        self._late_s = late_s
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self._upstream = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._clients: set[asyncio.Task[None]] = set()
        self._late: set[asyncio.Task[bytes]] = set()
        self.endpoint = ""
        self.begin(schedule)

    def begin(self, schedule: Schedule) -> None:
        """Another schedule, with counts and a log of its own."""
        self.schedule, self.log = schedule, list[str]()
        self._counts: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def settle(self) -> None:
        """Returns when every late request has been done."""
        self._do(self._finish_late())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _finish_late(self) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)

    async def _close(self) -> None:
        self._server.close()
        await self._finish_late()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while (request := await _read_request(reader)) is not None and await self._answer(request, reader, writer):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the client may ask again on the same connection."""
        count = self._counts[request.method, request.key]
        self._counts[request.method, request.key] += 1
        fault = self.schedule.fault(request.method, request.key, count)
        if fault is not None:
            self.log.append(f"{fault}: {request.method} {request.key} ({count})")
        if fault == "reset_request":
            await self._cut_request(request, reader)
            return _reset(writer)
        body = await reader.readexactly(request.length)
        self.schedule.read(fault)
        match fault:
            case "503" | "429":
                writer.write(_refusal(fault, request))
                await writer.drain()
                return True
            case "stall":
                await reader.read()  # until the client has had enough
                return False
            case "late":
                self._late.add(asyncio.ensure_future(self._ask_later(request, body)))
                return _reset(writer)
        reply = await self._ask(request.head + body)
        match fault:
            case "lost_reply":
                return _reset(writer)
            case "500":
                reply = _refusal(fault, request)
            case "reset_reply" | "stall_reply":
                writer.write(reply[: len(reply) // 2])
                await writer.drain()
                if fault == "reset_reply":
                    return _reset(writer)
                await reader.read()
                return False
        writer.write(reply)
        await writer.drain()
        return True

    async def _ask(self, request: bytes) -> bytes:
        """On a connection of its own, which the server closes after the reply."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            return _kept_alive(await reader.read())
        finally:
            writer.close()

    async def _ask_later(self, request: _Request, body: bytes) -> bytes:
        await asyncio.sleep(self._late_s)
        return await self._ask(request.head + body)

    async def _cut_request(self, request: _Request, reader: asyncio.StreamReader) -> None:
        """The server sees the connection end there too."""
        half = await reader.readexactly(request.length // 2)
        _, writer = await asyncio.open_connection(*self._upstream)
        writer.write(request.head + half if request.length else request.head[: len(request.head) // 2])
        with contextlib.suppress(OSError):
            await writer.drain()
        _reset(writer)


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    """Without its body. None where the client has closed the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    line, *fields = head[:-4].split(b"\r\n")
    method, target, _ = line.decode("latin-1").split(" ")
    named = {name.strip().lower(): value.strip() for name, _, value in (field.partition(b":") for field in fields)}
    assert b"transfer-encoding" not in named, "the proxy takes bodies of known length"
    kept = [field for field in fields if field.partition(b":")[0].strip().lower() not in (b"connection", b"expect")]
    if named.get(b"expect", b"").lower() == b"100-continue":
        raise EOFError("the proxy asks nobody to go on")  # a client without Expect is simpler, and all of ours are
    head = b"\r\n".join([line, *kept, b"Connection: close", b"", b""])
    return _Request(method=method, target=target, head=head, length=int(named.get(b"content-length", 0)))


def _kept_alive(reply: bytes) -> bytes:
    """The server was asked to close its connection; the client's stays open, so the reply needs a length."""
    head, _, body = reply.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    fields = [field for field in fields if field.partition(b":")[0].strip().lower() != b"connection"]
    known = {field.partition(b":")[0].strip().lower() for field in fields}
    if not known & {b"content-length", b"transfer-encoding"}:
        fields.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([line.replace(b"HTTP/1.0", b"HTTP/1.1"), *fields, b"", body])


def _refusal(fault: str, request: _Request) -> bytes:
    code = {"503": "SlowDown", "429": "TooManyRequests", "500": "InternalError"}[fault]
    body = b"" if request.method == "HEAD" else f"<Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
    head = f"HTTP/1.1 {fault} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _reset(writer: asyncio.StreamWriter) -> bool:
    """Ends the connection with RST instead of FIN. False, for `may ask again`."""
    found = writer.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
