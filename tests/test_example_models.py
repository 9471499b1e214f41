"""The examples with other libraries: each fits a page, names real code, and does what its config says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.launcher.compose import load_config
from dtrain.launcher.targetcheck import check_targets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def dtrain(*words: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "dtrain.launcher.cli", *map(str, words)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["digits", "huggingface"])
def test_the_code_fits_a_page_and_is_the_users_own(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 75
    assert "dtrain" not in text.split('"""')[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"), [("digits", "sklearn"), ("huggingface", "transformers"), ("finetune", "transformers")]
)
def test_the_config_composes_and_names_real_code(name: str, needs: str) -> None:
    pytest.importorskip(needs)
    config = load_config(EXAMPLES / f"{name}.yaml", [])
    assert check_targets(config, sys.executable, (str(EXAMPLES),)) == []


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_digits_are_read(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    dtrain("launch", EXAMPLES / "digits.yaml", cwd=tmp_path)
    evaluated = [e for e in records(tmp_path / "runs/digits/events.jsonl") if e["type"] == "evaluated"]
    assert evaluated[-1]["step"] == 240
    assert evaluated[-1]["metrics"]["accuracy"] > 0.97


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_from_a_config_to_a_folder_to_fine_tuning(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'dtrain[hf]'")
    dtrain("launch", EXAMPLES / "huggingface.yaml", "train.steps=20", "on_end=null", cwd=tmp_path)
    first = [record["loss"] for record in records(tmp_path / "runs/huggingface/metrics.jsonl")]
    assert first[0] > 5 > first[-1]
    said = dtrain("ckpt", "export", "runs/huggingface", "runs/base", cwd=tmp_path)
    assert "from_pretrained" in said
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/base").num_parameters() > 800_000
    said = dtrain("launch", EXAMPLES / "finetune.yaml", "train.steps=5", "on_end=null", cwd=tmp_path)
    assert "weights   " in said
    losses = [record["loss"] for record in records(tmp_path / "runs/finetune/metrics.jsonl")]
    assert losses[0] < first[0] - 1, "it starts from what was learned"
    failed = subprocess.run(
        [sys.executable, "-m", "dtrain.launcher.cli", "ckpt", "export", "runs/huggingface", "runs/base"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 2
    assert "nothing is overwritten" in failed.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["base", "finetune", "huggingface"]
