"""The example that a new user runs first: it is what it says, and it learns."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.launcher.compose import load_config
from dtrain.launcher.targetcheck import check_targets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIG = EXAMPLES / "gpt.yaml"


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("gpt")


def test_it_fits_a_page() -> None:
    assert len((EXAMPLES / "gpt.py").read_text().splitlines()) <= 75
    assert "dtrain" not in (EXAMPLES / "gpt.py").read_text().split('"""')[2], "a user's code needs nothing of dtrain"


@pytest.mark.slow
def test_the_config_composes_and_names_real_code() -> None:
    config = load_config(CONFIG, [])
    assert (config.cluster.nodes, config.name) == (2, "bytes-gpt")
    assert check_targets(config, sys.executable, (str(EXAMPLES),)) == []


def test_it_starts_from_knowing_nothing(gpt: Any) -> None:
    torch.manual_seed(0)
    model, data = gpt.GPT(context=32), gpt.SourceText("train", context=32)
    batch = torch.utils.data.default_collate([data[i] for i in range(16)])
    loss = gpt.loss(model(batch[0]), batch)
    assert loss.item() == pytest.approx(math.log(256), abs=0.3)


def test_a_position_sees_only_the_past(gpt: Any) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(layers=2, width=32, heads=2, context=16).eval()
    tokens = torch.randint(256, (1, 16))
    other = tokens.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 256
    with torch.no_grad():
        first, second = model(tokens), model(other)
    torch.testing.assert_close(first[0, :10], second[0, :10])
    assert not torch.allclose(first[0, 10:], second[0, 10:])


def test_targets_are_the_bytes_one_further_on(gpt: Any) -> None:
    data = gpt.SourceText("train", context=64)
    (x, y), (following, _) = data[7], data[8]
    assert torch.equal(x[1:], y[:-1])
    assert y[-1] == following[0]
    assert len(data[len(data) - 1][1]) == 64  # the last window is whole too


def test_the_splits_do_not_overlap(gpt: Any) -> None:
    train, held_out = gpt.SourceText("train"), gpt.SourceText("eval")
    assert 15 < len(train) / len(held_out) < 23
    assert len(train.text) + len(held_out.text) > 2_000_000
    assert not torch.equal(train.text[: len(held_out.text)], held_out.text)


def test_sample_is_text_and_follows_the_seed(gpt: Any) -> None:
    model = gpt.GPT(layers=1, width=16, heads=2, context=8)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(gpt.sample(model, prompt="import ", length=20, context=8))
    assert texts[0].startswith("import ")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_demo_learns(tmp_path: Path) -> None:
    """A quarter of the demo, with the schedule that belongs to its length."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dtrain.launcher.cli", "launch", "--run-dir", str(run_dir), str(CONFIG)]
    result = subprocess.run([*command, "train.steps=150"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 150
    assert losses[0] > 5
    assert sum(losses[-10:]) / 10 < 2.7
    committed = sorted(path.parent.name for path in (run_dir / "checkpoints").glob("step-*/manifest.json"))
    assert committed == ["step-00000050-a0001", "step-00000100-a0001", "step-00000150-a0001"]
    assert "\ndef " in result.stdout, "the sample is printed"
