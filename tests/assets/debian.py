"""Programs of Debian packages that tests start, installed where root and apt-get are; no service of theirs is started.

What can't be had raises Missing with what to install: a fixture makes it a skip, which DTRAIN_CI=1 makes a failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

POLICY = Path("/usr/sbin/policy-rc.d")  # asked before a package's scripts start a service; 101 forbids it
INSTALL_S = 600.0


class Missing(Exception):
    """A component can't start here. The message says what to install."""


def install(what: str, packages: Sequence[str], programs: Sequence[str], libraries: Sequence[str] = ()) -> None:
    """Returns at once where every one of `programs` is on the PATH, and every pattern of `libraries` fits a file below
    /usr/lib. Raises Missing."""

    def is_there() -> bool:
        return all(map(shutil.which, programs)) and all(any(Path("/usr/lib").glob(file)) for file in libraries)

    if is_there():
        return
    apt = shutil.which("apt-get")
    if os.geteuid() != 0 or apt is None:
        raise Missing(f"{what} needs: apt-get install --no-install-recommends {' '.join(packages)}")
    with _alone(apt), _no_services():
        if is_there():
            return  # by the test process that was first
        for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
            command = [apt, "-o", "DPkg::Lock::Timeout=300", *words]
            environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=INSTALL_S, check=False)
            if done.returncode != 0:
                raise Missing(f"{what}: apt-get {words[0]} failed for {', '.join(packages)}: {done.stderr[-500:]}")


@contextlib.contextmanager
def _alone(file: str) -> Iterator[None]:
    """One process of this machine at a time; the lock on an existing file leaves no file behind."""
    with open(file, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    if POLICY.exists():
        yield  # the machine has a rule of its own
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
