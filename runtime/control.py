"""The control port, seen from a client: where the coordinator is, how both sides prove the run's token, one request.

The token never crosses the wire: each side answers the other's random challenge with an HMAC. Messages are JSON lines
of bounded length. The coordinator's side is runtime/channel.py; this one has no event loop, for the command line.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.rundir import Control, RunDir, read_newest

MAX_HELLO_BYTES = 4 << 10  # a line of a peer that has proven nothing
MAX_LINE_BYTES = 8 << 20

Op = Literal["stop", "stack", "status"]


class ControlError(DtrainError):
    """The control port can't be reached, or the other side does not hold the run's token or keep to the protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorAddress:
    """control/<job_id>/coordinator-<term>.json"""

    term: int
    node_rank: int
    host: str
    addr: str
    port: int
    pid: int
    incarnation: int = 0  # of the job: see Control.incarnation

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def find_coordinator(control: Control) -> CoordinatorAddress | None:
    """The coordinator of the newest term; it may be dead. None where none was ever chosen."""
    record = read_newest(control.path, "coordinator-")
    return None if record is None else CoordinatorAddress(**record)


def newest_incarnation(control: Control) -> int:
    """Of the job, as its back end's scheduler has started it; 0 where that is no question."""
    try:
        return int(control.incarnation.read_text())
    except (OSError, ValueError):
        return 0


def is_there(control: Control) -> bool:
    """False when the run directory was removed, or moved: nothing else takes the token away."""
    try:
        os.stat(control.token)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # a file system that fails is no answer
    return True


def read_token(control: Control) -> bytes:
    """Raises ControlError where the file is missing or no token."""
    try:
        token = bytes.fromhex(Path(control.token).read_text().strip())
    except FileNotFoundError as error:
        raise ControlError(f"{control.token}: no such file. Was the job submitted from this run directory?") from error
    except ValueError as error:
        raise ControlError(f"{control.token}: not a token in hexadecimal digits") from error
    if len(token) < 32:
        raise ControlError(f"{control.token}: {len(token)} bytes, a token has 32")
    return token


def new_nonce() -> str:
    return secrets.token_hex(32)


def prove(token: bytes, role: Literal["client", "server"], server_nonce: str, client_nonce: str) -> str:
    """The answer to a challenge. The role keeps one side's answer from serving as the other's."""
    text = f"dtrain control 1\n{role}\n{server_nonce}\n{client_nonce}"
    return hmac.new(token, text.encode(), hashlib.sha256).hexdigest()


def is_proof(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Raises ControlError for anything but a JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlError("a line that is not JSON") from error
    if not isinstance(message, dict):
        raise ControlError("a line that is not a JSON object")
    return message


def request(run_dir: str, job_id: str, op: Op, *, timeout_s: float = 10.0) -> dict[str, Any]:
    """One request to the run's coordinator; its answer. Raises ControlError, also where nobody answers.

    stop      {"stopping": true}; the workers save and end
    stack     {"stacks": {global_rank: text}}; a rank that can't answer has its progress record instead
    status    {"status": {...}}, as in control/<job_id>/status.json, of this moment
    """
    control = RunDir(run_dir).control(job_id)
    address = find_coordinator(control)
    if address is None:
        raise ControlError(f"job {job_id}: no node has become its coordinator yet")
    where = f"the coordinator of job {job_id} on {address.host} ({address.addr}:{address.port})"
    try:
        with socket.create_connection((address.addr, address.port), timeout_s) as connection:
            stream = connection.makefile("rb")
            _introduce(connection, stream, read_token(control))
            connection.sendall(encode({"op": op}))
            return decode(_line(stream, MAX_LINE_BYTES))
    except OSError as error:
        raise ControlError(f"{where} can't be reached: {error}. Is the run still going on?") from error


def _introduce(connection: socket.socket, stream: BufferedReader, token: bytes) -> None:
    challenge = decode(_line(stream, MAX_HELLO_BYTES))
    server_nonce, client_nonce = str(challenge.get("challenge")), new_nonce()
    proof = prove(token, "client", server_nonce, client_nonce)
    connection.sendall(encode({"challenge": client_nonce, "proof": proof}))
    answer = decode(_line(stream, MAX_HELLO_BYTES))
    if not is_proof(answer.get("proof"), prove(token, "server", server_nonce, client_nonce)):
        raise ControlError(f"the other side of the control port does not hold the run's token: {answer.get('error')}")


def _line(stream: BufferedReader, limit: int) -> bytes:
    line = stream.readline(limit)
    if not line.endswith(b"\n"):
        raise ControlError("the control port was closed" if len(line) < limit else "a line over the size limit")
    return line
