"""One bash script on a machine that ssh reaches, and what became of it. The script travels over the connection's stdin:
nobody on either machine can read it from a command line, and one that was cut short is not run.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

CONNECT_S = 10
_AT_ONCE = 32
_END = "# the end"
_REMOTE = f"""exec bash -c 'dtrain_text=$(cat); [[ $dtrain_text == *"{_END}" ]] && eval "$dtrain_text"'"""
_OPTIONS = (
    "-T", "-x", "-a",
    "-o", "BatchMode=yes",  # a question for a password would never be answered
    "-o", f"ConnectTimeout={CONNECT_S}",
    "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=3",
    "-o", "LogLevel=ERROR",
)  # fmt: skip
_ADVICE = {
    "permission denied": "ssh must get in without a question: put your public key there (ssh-copy-id {host}).",
    "host key verification failed": "ssh does not know its key, or knows another: try `ssh {host}` by hand once.",
    "remote host identification has changed": "ssh knows another key of it: see ssh-keygen -R {host}.",
    "could not resolve hostname": "Is the name right, and does this machine know it?",
    "connection refused": "No sshd answers there: is the port right (cluster.ssh.options)?",
    "timed out": "It does not answer: is it up, and may this machine reach it?",
    "no route to host": "Is it up, and may this machine reach it?",
    "connection closed": "It hung up before anything ran: see its sshd's log.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`said`: the lines of the script's stdout. `problem`: why it did not run, or not to its end; else ""."""

    host: str
    said: tuple[str, ...] = ()
    problem: str = ""


def ssh_argv(host: str, options: Sequence[str]) -> tuple[str, ...]:
    """The user's own options come first: of several, ssh takes the first."""
    return ("ssh", *map(os.path.expanduser, options), *_OPTIONS, "--", host, _REMOTE)


def call(host: str, options: Sequence[str], script: str, timeout_s: float) -> Answer:
    """Never raises: a machine that does not answer is an answer."""
    mark = f"dtrain-{secrets.token_hex(8)}"  # what shells print before it (a message of the day) is not ours
    text = f"echo {mark}\n{script}\necho {mark}\n{_END}"
    try:
        done = subprocess.run(
            ssh_argv(host, options), input=os.fsencode(text), capture_output=True, timeout=timeout_s, check=False,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(host=host, problem="there is no ssh on this machine. Install OpenSSH's client.")
    except subprocess.TimeoutExpired:
        return Answer(host=host, problem=f"no answer within {timeout_s:.0f} s. Is it hung, or its disk?")
    lines = done.stdout.decode(errors="replace").splitlines()
    if mark not in lines:
        return Answer(host=host, problem=_why(host, done.returncode, done.stderr.decode(errors="replace")))
    begin = lines.index(mark) + 1
    said = tuple(lines[begin:])
    if not said or said[-1] != mark:
        end = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return Answer(host=host, said=said, problem=f"the connection broke: {end[0]}")
    return Answer(host=host, said=said[:-1])


def call_all(scripts: Mapping[str, str], options: Sequence[str], timeout_s: float) -> list[Answer]:
    """On all machines at once; the answers in their order."""
    if not scripts:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(scripts))) as pool:
        return list(pool.map(lambda item: call(item[0], options, item[1], timeout_s), scripts.items()))


def _why(host: str, code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    words = lines[-1].rstrip(".") if lines else f"ssh ended with {code} and said nothing"
    if code != 255:
        return f"no bash script can be run there: {words}"
    advice = next((text for sign, text in _ADVICE.items() if sign in stderr.lower()), "Try `ssh {host}` by hand.")
    return f"{words}. {advice.format(host=host)}"
