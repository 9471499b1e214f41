"""What the kernel grants: cores, memory, limits, shared memory, disk, the machine's own name. Linux, no torch.

`root` is an argument so that tests can show other machines.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.cluster.devices import usable_cores
from dtrain.launcher.doctor.finding import Finding, ok, problem, warn

TOPIC = "machine"
GIB = 2**30
_NAME_LOOKUP_S = 5.0
_MIN_FILES = 1024
_MIN_PROCESSES = 256
_MIN_SHM = GIB // 4


def examine(workers: int, root: Path = Path("/")) -> Iterator[Finding]:
    """`workers`: processes that a run would start here, with their loader processes."""
    yield _cores(workers)
    yield _memory(root)
    yield _shared_memory(root)
    yield _open_files()
    yield _processes()
    yield _own_name()


def free_space(path: Path) -> Finding:
    """Of the disk where `path` is, or will be."""
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{_gib(free)} free at {path}"
    if free < GIB:
        return problem(TOPIC, "disk", found, "Free space there, or choose another run_dir.")
    return ok(TOPIC, "disk", found)


def _cores(workers: int) -> Finding:
    usable, present = usable_cores(), os.cpu_count() or 1
    limit = f" of {present}: the affinity mask or the cgroup allows no more" if usable < present else ""
    found = f"{usable}{limit}"
    if workers > usable:
        return warn(
            TOPIC, "cores", f"{found}, for {workers} processes", "They will share cores: slow, but right. Fewer nodes?"
        )
    return ok(TOPIC, "cores", found)


def _memory(root: Path) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [total]
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    allowed = min(limits)
    found = _gib(allowed) + (f" of {_gib(total)}: the cgroup allows no more" if allowed < total else "")
    if allowed < 2 * GIB:
        return warn(TOPIC, "memory", found, "A worker needs about 0.5 GiB before any model.")
    return ok(TOPIC, "memory", found)


def _shared_memory(root: Path) -> Finding:
    try:
        size = shutil.disk_usage(root / "dev/shm").total
    except OSError:
        advice = "Mount a tmpfs there: loader processes hand over their batches through it."
        return problem(TOPIC, "/dev/shm", "there is none", advice)
    if size < _MIN_SHM:
        advice = "Loader processes may die of SIGBUS. In a container: --shm-size=1g or more; or data.workers: 0."
        return warn(TOPIC, "/dev/shm", _gib(size), advice)
    return ok(TOPIC, "/dev/shm", _gib(size))


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_FILES:
        return warn(TOPIC, "open files", f"at most {soft}", f"ulimit -n {_number(hard)}, where the run is started.")
    return ok(TOPIC, "open files", f"at most {_number(soft)}")


def _processes() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < _MIN_PROCESSES:
        advice = f"Threads count too. ulimit -u {_number(hard)}, where the run is started."
        return warn(TOPIC, "processes", f"at most {soft}", advice)
    return ok(TOPIC, "processes", f"at most {_number(soft)}")


def _own_name() -> Finding:
    """Libraries look the machine's own name up; where that takes a resolver's timeout, every start takes as long."""
    name, began = socket.gethostname(), time.monotonic()
    found: list[str] = []

    def look_up() -> None:
        try:
            found.append(str(socket.getaddrinfo(name, None)[0][4][0]))
        except OSError as error:
            found.append("")
            found.append(str(error))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_NAME_LOOKUP_S)
    seconds = time.monotonic() - began
    advice = f"Add a line to /etc/hosts: 127.0.1.1 {name}"
    if not found:
        return warn(TOPIC, "host name", f"looking {name} up takes more than {_NAME_LOOKUP_S:g} s", advice)
    if not found[0]:
        return warn(TOPIC, "host name", f"{name} can't be looked up ({found[1]})", advice)
    if seconds > 1:
        return warn(TOPIC, "host name", f"{name} is {found[0]}, but looking it up took {seconds:.1f} s", advice)
    return ok(TOPIC, "host name", f"{name} is {found[0]}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
