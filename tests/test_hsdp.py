"""fsdp with `replicate`: copies of the model, each cut over some ranks. The losses of one process, and any other
layout's checkpoints in both directions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import PARITY, Run, events, losses, metrics, numbers, prepare, rank_runner, worst_difference
from parity import TOLERANCE

HSDP = "{name: fsdp, replicate: 2}"
FOUR = "cluster.procs_per_node=4"  # what the check of the layout counts; the ranks here are the test's

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with rank_runner() as run_case:
        yield run_case


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


@pytest.mark.parametrize(("then", "then_size"), [("ddp", 3), (HSDP, 4)])
def test_any_layout_continues_its_run(
    run: Run, reference: Path, two_by_two: Path, tmp_path: Path, then: str, then_size: int
) -> None:
    more = [FOUR] if then == HSDP else []
    folder = prepare(tmp_path / "run", f"strategy={then}", *more, f"checkpoint.url={two_by_two / 'checkpoints'}")
    shutil.copy(two_by_two / "metrics.jsonl", folder)
    attempt = 2 + ["ddp", HSDP].index(then)
    assert run(folder, then_size, attempt=attempt, resume=[10, 1]) == [0] * then_size
    assert worst_difference(losses(folder), losses(reference)) <= TOLERANCE["fp32"]
    if then_size == 4:
        assert numbers(folder) == numbers(two_by_two), "the same layout: the same bits"


@pytest.mark.parametrize(("first", "first_size"), [("single", 1), ("fsdp", 3)])
def test_it_continues_any_layouts_run(run: Run, reference: Path, tmp_path: Path, first: str, first_size: int) -> None:
    before = prepare(tmp_path / "first", f"strategy={first}", "checkpoint.every=10", "checkpoint.keep=null")
    assert run(before, first_size) == [0] * first_size
    folder = prepare(tmp_path / "second", f"strategy={HSDP}", FOUR, f"checkpoint.url={before / 'checkpoints'}")
    shutil.copy(before / "metrics.jsonl", folder)
    assert run(folder, 4, attempt=2, resume=[10, 1]) == [0] * 4
    (resumed,) = events(folder, "resumed")
    assert (resumed["strategy"], resumed["world_size"]) == (first, first_size)
    assert worst_difference(losses(folder), losses(reference)) <= TOLERANCE["fp32"]


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
