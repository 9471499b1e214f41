"""Three axes at once, on eight ranks: every one learns what one process learns, and goes on from what another saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import PARITY, Run, losses, metrics, numbers, prepare, rank_runner, worst_difference

TOLERANCE = 2e-6
BASE: dict[str, Any] = {
    **PARITY,
    "model": {"_target_": "parity.Transformer", "vocab": 96, "width": 32, "layers": 2, "heads": 4, "seq": 8},
    "data": {"train": {"_target_": "parity.Tokens", "vocab": 96, "seq": 8}, "batch_size": 13},
    "schedule": {"name": "cosine", "warmup": 2},
    "train": {"steps": 4, "clip_grad_norm": 1.0, "micro_batch": 4},
    "checkpoint": {"every": 2, "keep": None},
}
LAYOUTS = (
    "{name: fsdp, replicate: 2, tensor: 2, sequence_parallel: true}",
    "{name: fsdp, shard: 2, tensor: 2, pipeline: 2}",
    "{name: ddp, tensor: 2, pipeline: 2, pipeline_schedule: gpipe}",
)
SIZE = 8

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("alone") / "run", base=BASE)
    assert run(folder, 1) == [0]
    return folder


@pytest.fixture(scope="module")
def before() -> list[Path]:
    """The runs so far."""
    return []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_ranks_learn_what_one_learns(
    run: Run, alone: Path, before: list[Path], tmp_path: Path, layout: str
) -> None:
    """From the start; and from the checkpoint of the layout before, the first one from its own, bit by bit."""
    folder = prepare(tmp_path / "run", f"strategy={layout}", f"cluster.procs_per_node={SIZE}", base=BASE)
    assert run(folder, SIZE) == [0] * SIZE
    assert worst_difference(losses(folder), losses(alone)) <= TOLERANCE
    norms, wanted = ([r["grad_norm"] for r in metrics(each)] for each in (folder, alone))
    assert norms == pytest.approx(wanted, rel=1e-4)
    source = before[-1] if before else folder
    again = prepare(tmp_path / "again", f"strategy={layout}", f"cluster.procs_per_node={SIZE}", base=BASE)
    shutil.copytree(source / "checkpoints", again / "checkpoints")
    assert run(again, SIZE, attempt=2, resume=[2, 1]) == [0] * SIZE
    assert worst_difference(losses(again), losses(alone)[2:]) <= TOLERANCE
    if source == folder:
        assert numbers(again) == numbers(folder)[2:], "the same layout: the same bits"
    before.append(folder)
