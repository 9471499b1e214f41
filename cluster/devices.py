"""What this machine has, without torch: GPUs that the processes may use, and CPU cores that are really theirs.

`root` and `environ` are arguments so that tests can show other machines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_NVIDIA_SMI_TIMEOUT_S = 20


def count_gpus(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> int:
    """NVIDIA GPUs that a process started now would see. CUDA_VISIBLE_DEVICES is read as CUDA reads it."""
    env = os.environ if environ is None else environ
    present = _gpus_of_driver(root)
    if present is None:
        present = _gpus_of_nvidia_smi(env)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None or present == 0 else _count_visible(visible, present)


def _count_visible(visible: str, present: int) -> int:
    """Entries up to the first invalid one: CUDA ignores that and all after it. An entry named twice leaves none."""
    seen: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        valid = int(entry) < present if entry.isdigit() else entry.startswith(("GPU-", "MIG-"))
        if not valid:
            break
        seen.append(entry)
    return len(seen) if len(set(seen)) == len(seen) else 0


def _gpus_of_driver(root: Path) -> int | None:
    """From the kernel driver's own list; None where there is no such list (WSL).

    A GPU without a device file that we may open belongs to another container.
    """
    folder = root / "proc/driver/nvidia/gpus"
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return None
    return sum(_may_open(root, entry) for entry in entries)


def _may_open(root: Path, entry: Path) -> bool:
    try:
        lines = (entry / "information").read_text().splitlines()
    except OSError:
        return True
    minors = [line.partition(":")[2].strip() for line in lines if line.startswith("Device Minor")]
    return not minors or os.access(root / f"dev/nvidia{minors[0]}", os.R_OK | os.W_OK)


def _gpus_of_nvidia_smi(environ: Mapping[str, str]) -> int:
    command = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if not command:
        return 0
    try:
        listed = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity mask, less where the cgroup's CPU quota allows less. At least 1."""
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_cores(folder / "cpu.max")) is not None]
    return max(1, int(min([float(cores), *quotas])))


def _cgroup_folders(root: Path) -> list[Path]:
    """Our cgroup (v2) and those above it: each may limit us."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    top = root / "sys/fs/cgroup"
    parts = [part for part in own.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _quota_cores(path: Path) -> float | None:
    """`cpu.max` is "<quota> <period>" in microseconds, or "max <period>" (kernel's cgroup-v2.rst)."""
    try:
        quota, period = path.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
