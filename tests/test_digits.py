"""A convolutional network for digits, with buffers, learns on any data-parallel layout what one process learns."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Run, events, losses, needs, prepare, rank_runner, worst_difference
from parity import TOLERANCE

from dtrain.cluster.storage import open_storage
from dtrain.runtime.checkpoint.attempts import claim_attempt
from dtrain.runtime.checkpoint.loader import load_model

needs("sklearn", "needs scikit-learn: pip install scikit-learn", module=True)
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = 30
# At the example's own rate the curve, near its end, makes much of little: 6e-4 out of 2e-7.
DIGITS: dict[str, Any] = {
    "model": {"_target_": "counting_digits.Net"},
    "loss": "digits.loss",
    "metrics": "digits.metrics",
    "data": {
        "train": {"_target_": "digits.Digits"},
        "eval": {"_target_": "digits.Digits", "split": "test"},
        "batch_size": 64,
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    "train": {"steps": STEPS, "eval_every": STEPS},
}
LAYOUTS = [
    ("ddp", 3, ""),
    ("fsdp", 2, ""),
    ("{name: fsdp, replicate: 2}", 4, ""),
    ("zero1", 2, "deepspeed"),
    ("zero2", 3, "deepspeed"),
    ("zero3", 2, "deepspeed"),
    ("horovod", 2, "horovod"),
]


@pytest.fixture(scope="module")
def run() -> Run:
    preload = ["digits", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])]
    return rank_runner({"PYTHONPATH": str(EXAMPLES), "DS_ACCELERATOR": "cpu"}, preload=preload)


def train(run: Run, folder: Path, strategy: str, size: int) -> Path:
    prepare(folder, f"strategy={strategy}", f"cluster.procs_per_node={size}", base=DIGITS)
    claim_attempt(open_storage(str(folder / "checkpoints")), host="here", job_id="case")
    assert run(folder, size) == [0] * size
    return folder


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(run, tmp_path_factory.mktemp("one") / "run", "single", 1)


@pytest.mark.parametrize(("strategy", "size", "package"), LAYOUTS)
def test_the_digits_learn_the_same(
    run: Run, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, size: int, package: str
) -> None:
    """Losses, an evaluation, and what the last checkpoint holds."""
    if package:
        needs(package, f"needs {package}: docs/strategies.md says how it is installed")
    folder = train(run, tmp_path / "run", strategy, size)
    assert worst_difference(losses(folder), losses(one)) <= TOLERANCE["fp32"]
    found, wanted = (events(each, "evaluated")[0]["metrics"] for each in (folder, one))
    assert found == pytest.approx(wanted, rel=1e-5)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    model = importlib.import_module("counting_digits").Net
    here, there = model(), model()
    load_model(str(folder / "checkpoints"), here)
    load_model(str(one / "checkpoints"), there)
    for name, buffer in there.named_buffers():
        assert torch.equal(here.get_buffer(name), buffer), name
    for name, parameter in there.named_parameters():
        torch.testing.assert_close(here.get_parameter(name), parameter, rtol=0, atol=2e-5)
    assert int(here.forwards) == STEPS
