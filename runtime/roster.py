"""The coordinator's view of the nodes: who is connected, when each was last heard, and an inbox of what they say.

Serves the control port. Judges nothing but silence; clients' requests are handed on.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from dtrain.cluster.ports import PortRange, listening_socket
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import Control, look_again, read_json
from dtrain.runtime.background import in_background
from dtrain.runtime.channel import Channel, accept
from dtrain.runtime.control import ControlError
from dtrain.runtime.options import Timings

Message = dict[str, Any]
OnClient = Callable[[Message], Awaitable[Message]]
NOBODY = -1  # the sender of messages that no node sent
_MAX_STRANGERS = 64  # peers that have proven nothing yet and are heard at one time
_ACCEPT_PAUSE_S = 0.1


@dataclass(slots=True)
class Member:
    """A connected node. Its workers' progress is as of its last heartbeat."""

    channel: Channel
    process: ProcessId
    heard_at: float
    reached: int = 0
    workers: list[Message] = field(default_factory=list)


class Roster:
    """`inbox` gets (node_rank, message); {"op": "joined"} and {"op": "lost", "reason"} are of our own making."""

    def __init__(
        self,
        control: Control,
        token: bytes,
        num_nodes: int,
        timings: Timings,
        on_client: OnClient,
        *,
        incarnation: int = 0,
    ) -> None:
        self._control = control
        self._token = token
        self._num_nodes = num_nodes
        self._timings = timings
        self._on_client = on_client
        self._incarnation = incarnation
        self._server: socket.socket | None = None
        self._strangers = asyncio.Semaphore(_MAX_STRANGERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self.members: dict[int, Member] = {}
        self.inbox: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()

    async def open(self, address: str, ports: PortRange | None = None) -> int:
        """Listens on a free port of `address`; the port. Raises UsageError where `ports` has none left."""
        self._server = listening_socket(address, ports)
        self._server.setblocking(False)
        self._tasks |= {asyncio.create_task(self._watch()), asyncio.create_task(self._accept(self._server))}
        return int(self._server.getsockname()[1])

    async def close(self) -> None:
        """Hangs up on everybody."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for member in list(self.members.values()):
            await member.channel.drain(0.5)
            member.channel.close()
        self.members.clear()

    def send(self, node_rank: int, message: Message) -> None:
        if node_rank in self.members:
            self.members[node_rank].channel.send(message)

    def broadcast(self, message: Message) -> None:
        for member in self.members.values():
            member.channel.send(message)

    def drop(self, node_rank: int, reason: str) -> None:
        """Takes a node off the roster; it may join again."""
        member = self.members.pop(node_rank, None)
        if member is not None:
            member.channel.abort()
            self.inbox.put_nowait((node_rank, {"op": "lost", "reason": reason, "reached": member.reached}))

    async def _accept(self, server: socket.socket) -> None:
        """Connections one by one; while many strangers are being heard, the next ones wait in the kernel."""
        loop = asyncio.get_running_loop()
        while True:
            await self._strangers.acquire()
            try:
                connection, _ = await loop.sock_accept(server)
            except OSError:  # out of descriptors, or the peer has gone already
                self._strangers.release()
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            except BaseException:
                self._strangers.release()
                raise
            task = asyncio.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            channel = await accept(connection, self._token, self._timings.handshake_s)
        finally:
            self._strangers.release()
        if channel is None:
            return
        try:
            await self._introduced(channel)
        except ControlError as error:
            channel.send({"error": str(error)})
        except (TimeoutError, OSError):
            pass  # a peer that went away or says nothing
        finally:
            channel.close()

    async def _introduced(self, channel: Channel) -> None:
        first = await asyncio.wait_for(channel.receive(), self._timings.handshake_s)
        if first is None:
            return
        if first.get("op") != "hello":
            channel.send(await self._on_client(first))
            await channel.drain(self._timings.handshake_s)
            return
        await in_background(lambda: look_again(self._control.path))  # it may have put itself down just now
        node_rank, member = self._admit(first, channel)
        await self._listen(node_rank, member)

    def _admit(self, hello: Message, channel: Channel) -> tuple[int, Member]:
        """Raises ControlError where the node is none of ours."""
        try:
            node_rank, process = int(hello["node_rank"]), ProcessId.from_json(hello["process"])
        except (KeyError, TypeError, ValueError) as error:
            raise ControlError(f"a hello without a proper {error}") from error
        if hello.get("incarnation", 0) != self._incarnation:
            raise ControlError(f"incarnation {hello.get('incarnation')} of the job, this is {self._incarnation}")
        if self._control.without(node_rank).exists():
            raise ControlError(f"the job goes on without node {node_rank}")
        registered = read_json(self._control.node(node_rank))
        if not 0 <= node_rank < self._num_nodes:
            raise ControlError(f"there is no node {node_rank} among {self._num_nodes}")
        if registered is not None and ProcessId.from_json(registered) != process:
            channel.send({"op": "refused", "reason": f"process {registered['pid']} serves node {node_rank} now"})
            raise ControlError("another process has taken this node's place")
        self.drop(node_rank, "it joined once more")
        member = Member(channel, process, time.monotonic(), reached=int(hello.get("reached", 0)))
        self.members[node_rank] = member
        channel.send({"op": "welcome"})
        self.inbox.put_nowait((node_rank, {"op": "joined", "host": process.host, "reached": member.reached}))
        return node_rank, member

    async def _listen(self, node_rank: int, member: Member) -> None:
        reason = "its agent ended or the connection broke"
        try:
            while (message := await member.channel.receive()) is not None:
                member.heard_at = time.monotonic()
                if message.get("op") == "ping":
                    member.workers = list(message.get("workers", ()))
                    member.reached = int(message.get("reached", 0))
                else:
                    self.inbox.put_nowait((node_rank, message))
        except ControlError as error:
            reason = f"it does not keep to the protocol: {error}"
        if self.members.get(node_rank) is member:
            self.drop(node_rank, reason)

    async def _watch(self) -> None:
        """Heartbeats to all, and the end of those that have been silent for too long."""
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._timings.heartbeat_s)
            now = time.monotonic()
            if now - looked_at > self._timings.dead_after_s / 2:
                # It was us who slept (stopped, or starved): what the others said meanwhile waits to be read.
                for member in self.members.values():
                    member.heard_at = now
            looked_at = now
            self.broadcast({"op": "ping"})
            for node_rank, member in list(self.members.items()):
                silence = now - member.heard_at
                if silence > self._timings.dead_after_s:
                    self.drop(node_rank, f"nothing heard of it for {silence:.1f} s")
