"""Processes as Linux sees them: dying with one's parent, being told apart from a later process of the same number,
clearing a session. Leaves to the callers what to start and when to end it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)

Liveness = Literal["alive", "gone", "unknown"]


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent` ends, however it ends. Ends at once where that has happened already.

    The promise holds for a parent's main thread: the kernel watches the thread that forked.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def set_process_name(name: str) -> None:
    """What `ps -o comm` and `top` show; the kernel keeps 15 bytes. Blanks become dashes: Slurm's proctrack/linuxproc
    (seen with 22.05) misreads /proc/PID/stat of a process whose name has one, and then can't end it."""
    _libc.prctl(_PR_SET_NAME, name.replace(" ", "-").encode()[:15], 0, 0, 0)


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if there is no such process or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state (field 3) on: the name before it may hold blanks and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process, for ever: its number alone is used again, with start time and boot it is not."""

    pid: int
    started: int
    boot: str
    host: str

    @staticmethod
    def of(pid: int) -> ProcessId:
        """Raises ProcessLookupError where there is no such process."""
        started = start_time(pid)
        if started is None:
            raise ProcessLookupError(f"no process {pid}")
        return ProcessId(pid=pid, started=started, boot=boot_id(), host=socket.gethostname())

    @staticmethod
    def from_json(data: dict[str, Any]) -> ProcessId:
        return ProcessId(
            pid=int(data["pid"]), started=int(data["started"]), boot=str(data["boot"]), host=str(data["host"])
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def liveness(self) -> Liveness:
        """Unknown for a process of another host."""
        if self.host != socket.gethostname():
            return "unknown"
        return "alive" if self.boot == boot_id() and start_time(self.pid) == self.started else "gone"

    def kill(self, number: signal.Signals) -> bool:
        """Signals this very process; False where it is gone or of another host."""
        if self.liveness() != "alive":
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def end_session(self) -> None:
        """SIGKILLs it and all of the session that it leads: the lines of `setup` that it waits for would live on."""
        if self.kill(signal.SIGKILL):
            clear_session(self.pid, frozenset())


def session_members(session: int) -> list[int]:
    """The living processes of a session. A data loader's processes stay in their worker's session."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields is not None and fields[0] not in "ZX" and int(fields[3]) == session:
                members.append(int(entry))
    return members


def clear_session(session: int, spare: frozenset[int]) -> None:
    """SIGKILLs all of a session but `spare`, until none is left (a process may fork while we look)."""
    for _ in range(50):
        found = [pid for pid in session_members(session) if pid not in spare]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})

# By which schedulers and their users ask a job to save and end: those of sbatch --signal, and what a limit sends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
EARLY_STOP = "DTRAIN_EARLY_STOP"  # the name of one that came before Python ran: cluster/nodescript.py


def ignore_bystanders() -> None:
    """A scheduler signals every process of a job; of these signals only agents make a stop, and nobody dies of one."""
    for number in (signal.SIGUSR2, signal.SIGXCPU):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)


def unblock_stops() -> None:
    """From here on SIGTERM and SIGINT arrive, also those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


@contextlib.contextmanager
def stops_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_detached: list[subprocess.Popen[bytes]] = []  # kept only so that those that ended while we live are reaped


def start_detached(argv: list[str], *, cwd: str, environ: dict[str, str], log: Path) -> ProcessId:
    """Starts a process that outlives this one: own session, no stdin, output appended to `log`.

    It begins with SIGTERM and SIGINT blocked, so that one sent before it can handle them waits: see `unblock_stops`.
    """
    for earlier in list(_detached):
        if earlier.poll() is not None:
            _detached.remove(earlier)
    with open(log, "ab") as output, stops_blocked():
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _detached.append(process)
    return ProcessId.of(process.pid)
