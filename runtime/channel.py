"""The control port inside agents and coordinator: authenticated JSON lines over asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
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


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, timeout_s: float
) -> Channel | None:
    """The server's side of the introduction; None (and the connection is closed) for a peer without the token."""
    server_nonce = new_nonce()
    writer.write(encode({"challenge": server_nonce}))
    try:
        answer = decode(await asyncio.wait_for(_short_line(reader), timeout_s))
        client_nonce = str(answer.get("challenge"))
        if not is_proof(answer.get("proof"), prove(token, "client", server_nonce, client_nonce)):
            writer.write(encode({"error": "wrong token"}))
            raise ControlError("wrong token")
        writer.write(encode({"proof": prove(token, "server", server_nonce, client_nonce)}))
    except (ControlError, OSError, TimeoutError):
        writer.close()
        return None
    return Channel(reader, writer)


async def connect(addr: str, port: int, token: bytes, timeout_s: float) -> Channel:
    """The client's side. Raises OSError or TimeoutError where nobody answers, ControlError for a stranger."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(addr, port, limit=MAX_LINE_BYTES), timeout_s)
    try:
        server_nonce = str(decode(await asyncio.wait_for(_short_line(reader), timeout_s)).get("challenge"))
        client_nonce = new_nonce()
        writer.write(encode({"challenge": client_nonce, "proof": prove(token, "client", server_nonce, client_nonce)}))
        answer = decode(await asyncio.wait_for(_short_line(reader), timeout_s))
        if not is_proof(answer.get("proof"), prove(token, "server", server_nonce, client_nonce)):
            raise ControlError(f"no proof of the run's token from {addr}:{port}: {answer.get('error')}")
    except BaseException:
        writer.transport.abort()
        raise
    return Channel(reader, writer)


async def _short_line(reader: asyncio.StreamReader) -> bytes:
    """A line of a stranger, read without ever holding more than the limit of it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = await reader.read(1)
        line += byte
        if not byte or len(line) > MAX_HELLO_BYTES:
            raise ControlError("no proper introduction")
    return line
