"""fsdp with `replicate`: copies of the model, each cut over some ranks. The losses of one process, and any other
layout's checkpoints in both directions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import PARITY, Run, events, losses, metrics, numbers, prepare, rank_runner, worst_difference
from parity import TOLERANCE

HSDP = "{name: fsdp, replicate: 2}"
FOUR = "cluster.procs_per_node=4"  # what the check of the layout counts; the ranks here are the test's

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


@pytest.fixture(scope="module")
def reference(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, with checkpoints to continue from."""
    folder = prepare(tmp_path_factory.mktemp("one") / "run", "checkpoint.every=10", "checkpoint.keep=null")
    assert run(folder, 1) == [0]
    return folder


@pytest.fixture(scope="module")
def two_by_two(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(
        tmp_path_factory.mktemp("hsdp") / "run", f"strategy={HSDP}", FOUR, "checkpoint.every=10", "checkpoint.keep=null"
    )
    assert run(folder, 4) == [0] * 4
    return folder


def test_two_copies_over_two_ranks_each_learn_what_one_process_learns(reference: Path, two_by_two: Path) -> None:
    assert worst_difference(losses(two_by_two), losses(reference)) <= TOLERANCE["fp32"]
    norms, wanted = ([r["grad_norm"] for r in metrics(folder)] for folder in (two_by_two, reference))
    assert norms == pytest.approx(wanted, rel=1e-4)


def test_the_copies_share_the_work_of_saving(two_by_two: Path) -> None:
    step = two_by_two / "checkpoints" / "step-00000010-a0001"
    sizes = [path.stat().st_size for path in step.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) < 1.05 * min(sizes)


def test_a_resume_gives_the_same_bits(run: Run, two_by_two: Path, tmp_path: Path) -> None:
    """Changes of the layout, from it and to it: test_any_layout.py."""
    folder = prepare(tmp_path / "run", f"strategy={HSDP}", FOUR, f"checkpoint.url={two_by_two / 'checkpoints'}")
    shutil.copy(two_by_two / "metrics.jsonl", folder)
    assert run(folder, 4, attempt=2, resume=[40, 1]) == [0] * 4
    assert numbers(folder) == numbers(two_by_two)
    (resumed,) = events(folder, "resumed")
    assert (resumed["strategy"], resumed["world_size"]) == ("fsdp", 4)


@pytest.mark.parametrize(("nodes", "procs"), [(2, 2), (4, 1)])
def test_over_nodes(reference: Path, tmp_path: Path, nodes: int, procs: int) -> None:
    config = tmp_path / "cfg.yaml"
    config.write_text(json.dumps({**PARITY, "cluster": {"nodes": nodes, "procs_per_node": procs}}))
    shutil.copy(Path(__file__).parent / "assets" / "parity.py", tmp_path)
    command = [sys.executable, "-m", "dtrain.launcher.cli", "launch", "--run-dir", str(tmp_path / "run"), str(config)]
    result = subprocess.run([*command, f"strategy={HSDP}"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"2 copies, each cut over 2 ranks {'of a node' if procs == 2 else 'across nodes'}" in result.stdout
    assert worst_difference(losses(tmp_path / "run"), losses(reference)) <= TOLERANCE["fp32"]
