"""Counting GPUs and cores, on machines played by a folder tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.cluster.devices import count_gpus, usable_cores


def _driver(root: Path, num_gpus: int, num_device_files: int) -> None:
    for minor in range(num_gpus):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{minor}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t NVIDIA H100\nDevice Minor: \t {minor}\n")
    (root / "dev").mkdir(parents=True, exist_ok=True)
    for minor in range(num_device_files):
        (root / f"dev/nvidia{minor}").touch()


@pytest.mark.parametrize(
    ("visible", "num_gpus"),
    [
        (None, 4),
        ("", 0),
        ("0", 1),
        ("2, 3", 2),
        ("0,1,7,2", 2),  # CUDA stops at the first that does not exist
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,0", 0),
        ("GPU-8932f937,GPU-7a1b", 2),
        ("MIG-41f3", 1),
    ],
)
def test_visible_devices(tmp_path: Path, visible: str | None, num_gpus: int) -> None:
    _driver(tmp_path, 4, 4)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(environ, tmp_path) == num_gpus


def test_gpus_of_other_containers_do_not_count(tmp_path: Path) -> None:
    _driver(tmp_path, 8, 2)
    assert count_gpus({}, tmp_path) == 2


def test_nvidia_smi_where_the_driver_lists_nothing(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: RTX (UUID: GPU-1)'\necho '  MIG 1g.5gb Device 0: (UUID: MIG-1)'\n")
    smi.chmod(0o755)
    assert count_gpus({"PATH": str(tmp_path)}, tmp_path) == 1
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert count_gpus({"PATH": str(tmp_path)}, tmp_path) == 0


def test_no_gpus(tmp_path: Path) -> None:
    assert count_gpus({"PATH": "", "CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0


def _cgroup(root: Path, own: str, quotas: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::{own}\n")
    for folder, text in quotas.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.max").write_text(text)


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 6),
        ({"": "max 100000"}, 6),
        ({"pod/app": "200000 100000"}, 2),
        ({"pod": "350000 100000", "pod/app": "max 100000"}, 3),
        ({"pod": "50000 100000"}, 1),
        ({"pod/app": "6400000 100000"}, 6),
        ({"other": "100000 100000"}, 6),
        ({"pod/app": "garbage"}, 6),
    ],
)
def test_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quotas: dict[str, str], cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    _cgroup(tmp_path, "/pod/app", quotas)
    assert usable_cores(tmp_path) == cores


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
