"""The table of what goes with which strategy says what a launch says, and cells that say yes train."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from cases import PARITY, Run, losses, prepare, rank_runner

from dtrain.cluster.configfile import dump_yaml
from dtrain.cluster.errors import ConfigError
from dtrain.launcher.capabilities import FEATURES, Feature, refusal, render
from dtrain.launcher.compose import load_config
from dtrain.strategies.caps import CAPS

REPO = Path(__file__).resolve().parent.parent


def test_the_page_is_what_the_code_says() -> None:
    committed = (REPO / "docs" / "strategies.md").read_text()
    assert committed == render(), "run: python -m dtrain.launcher.capabilities > docs/strategies.md"


@pytest.mark.parametrize("name", CAPS)
def test_a_launch_refuses_what_the_table_refuses_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "cfg.yaml").write_text(json.dumps(PARITY))
    for feature in FEATURES:
        words = refusal(name, feature)
        assert _said(tmp_path / "cfg.yaml", _overrides(name, feature)) == words, feature.label


def _said(config: Path, overrides: list[str]) -> str:
    try:
        load_config(config, overrides)
    except ConfigError as error:
        return " ".join(f"{problem.key}: {problem.message}" for problem in error.problems)
    return ""


def _overrides(name: str, feature: Feature) -> list[str]:
    ranks = 1 if name == "single" else 2
    cluster = {"backend": "slurm", "nodes": ranks, "procs_per_node": ranks, "python": "/nodes/python"}
    cluster["gpus_per_node"] = ranks * feature.gpus
    train: dict[str, Any] = {"micro_batch": None, "clip_grad_norm": None}
    train |= {key: getattr(value, "shards", value) for key, value in feature.train.items()}
    words = {
        **{f"cluster.{key}": value for key, value in cluster.items()},
        "data.batch_size": 32,
        "model.deferred_init": feature.deferred_init,
        **{f"train.{key}": value for key, value in train.items()},
        "strategy": {"name": name, **feature.strategy},
    }
    return [f"{key}={dump_yaml(value, flow=True)}" for key, value in words.items()]


@pytest.fixture(scope="module")
def run() -> Run:
    preload = ["deepspeed"] if importlib.util.find_spec("deepspeed") else []
    return rank_runner({"DS_ACCELERATOR": "cpu"}, preload=preload)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("strategy", "overrides"),
    [
        ("ddp", ("train.activation_checkpointing=full", "train.precision=bf16")),
        ("{name: fsdp, shard: 2}", ("train.exact=8",)),
        ("{name: fsdp, tensor: 2, sequence_parallel: true}", ("train.precision=fp16",)),
        ("zero3", ("train.activation_checkpointing=full",)),
        ("{name: zero1, offload: cpu}", ("train.precision=bf16",)),
        ("horovod", ("train.precision=fp16",)),
    ],
)
def test_cells_that_say_yes_train(run: Run, tmp_path: Path, strategy: str, overrides: tuple[str, ...]) -> None:
    for package in (package for name, caps in CAPS.items() if name in strategy for package in caps.needs):
        pytest.importorskip(package.module, reason=f"needs {package.module}. {package.install}")
    folder = prepare(
        tmp_path / "run", f"strategy={strategy}", "cluster.procs_per_node=2", "train.steps=2", "schedule=constant",
        *overrides,
    )  # fmt: skip
    assert run(folder, 2) == [0, 0]
    assert len(losses(folder)) == 2
