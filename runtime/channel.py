"""The control port inside agents and coordinator: authenticated JSON lines over asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from dtrain.runtime.control import (
    MAX_HELLO_BYTES,
    MAX_LINE_BYTES,
    ControlError,
    decode,
    encode,
    is_proof,
    new_nonce,
    prove,
)


class Channel:
    """One authenticated connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: dict[str, Any]) -> None:
        """Queues a message; a peer that is gone is noticed by `receive`."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> dict[str, Any] | None:
        """None at the end, also when the connection broke. Raises ControlError for a garbled or overlong line."""
        try:
            line = await self._reader.readline()
        except (ConnectionError, OSError):
            return None
        except ValueError as error:  # over the stream's limit
            raise ControlError("a line over the size limit") from error
        return decode(line) if line.endswith(b"\n") else None

    async def drain(self, timeout_s: float) -> None:
        """Waits until what was sent has left, for a while."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._writer.drain(), timeout_s)

    def close(self) -> None:
        """Drops the connection; what is still queued for a peer that does not read is dropped with it."""
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()


async def accept(connection: socket.socket, token: bytes, timeout_s: float) -> Channel | None:
    """The server's side of the introduction; None (and the connection is closed) for a peer without the token."""
    try:
        async with asyncio.timeout(timeout_s):
            await _admit(connection, token)
        return await _open(connection)
    except (ControlError, OSError):  # TimeoutError is one
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


async def connect(addr: str, port: int, token: bytes, timeout_s: float) -> Channel:
    """The client's side. Raises OSError or TimeoutError where nobody answers, ControlError for a stranger."""
    connection = socket.socket(socket.AF_INET6 if ":" in addr else socket.AF_INET)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, (addr, port))
            await _introduce(connection, token, f"{addr}:{port}")
        return await _open(connection)
    except BaseException:
        connection.close()
        raise


async def _open(connection: socket.socket) -> Channel:
    """Streams with room for long messages, for a peer that has proven the token."""
    return Channel(*await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES))


async def _admit(connection: socket.socket, token: bytes) -> None:
    """Raises ControlError where the peer does not hold the token."""
    server_nonce = new_nonce()
    await _say(connection, {"challenge": server_nonce})
    answer = await _hear(connection)
    client_nonce = str(answer.get("challenge"))
    if not is_proof(answer.get("proof"), prove(token, "client", server_nonce, client_nonce)):
        await _say(connection, {"error": "wrong token"})
        raise ControlError("wrong token")
    await _say(connection, {"proof": prove(token, "server", server_nonce, client_nonce)})


async def _introduce(connection: socket.socket, token: bytes, where: str) -> None:
    """Raises ControlError where the other side does not hold the token."""
    server_nonce = str((await _hear(connection)).get("challenge"))
    client_nonce = new_nonce()
    await _say(connection, {"challenge": client_nonce, "proof": prove(token, "client", server_nonce, client_nonce)})
    answer = await _hear(connection)
    if not is_proof(answer.get("proof"), prove(token, "server", server_nonce, client_nonce)):
        raise ControlError(f"no proof of the run's token from {where}: {answer.get('error')}")


async def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, encode(message))


async def _hear(connection: socket.socket) -> dict[str, Any]:
    """A line of a stranger, who never makes this process hold more than the limit. Bytes behind it are not read: the
    line after it may be that of a proven peer."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(connection, 1)
        line += byte
        if not byte or len(line) > MAX_HELLO_BYTES:
            raise ControlError("no proper introduction")
    return decode(line)
