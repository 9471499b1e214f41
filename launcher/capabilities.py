"""docs/strategies.md, generated: `python -m dtrain.launcher.capabilities > docs/strategies.md`. Each cell of its table
asks the very checks that a launch asks, about a job of four ranks, so that the table says what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.cluster.jobplan import ClusterConfig
from dtrain.launcher.checks import check_sections
from dtrain.runtime.config import DataConfig, Target, TrainConfig
from dtrain.runtime.modelconfig import ModelConfig
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import ExactConfig, StrategyConfig

_HEAD = """\
# What goes with which strategy

Written by `python -m dtrain.launcher.capabilities`, which asks the checks of `dtrain launch`; a test keeps it true. A
cell is a job of 2 nodes x 2 processes (`single`: one) with that setting; a number stands for the words with which it is
refused before anything starts, NAME for the strategy's. `dtrain doctor` says which strategies can run on a machine.
"""
_ANYWHERE = """\
With every strategy: parameter groups, frozen parameters, tied weights and buffers, accumulation, every schedule,
map-style and iterable data, evaluations, and going on from the checkpoint of any other strategy at any other number of
ranks. What only the built model tells (a layer that a plan can't cut, a parameter without a dimension to cut) is said
in words when the workers build it. `dtrain verify` tries what a strategy makes of your own model.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A row: what is set besides the strategy's name."""

    label: str
    train: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    deferred_init: bool = False
    gpus: bool = False


FEATURES = (
    Feature(label="CPUs"),
    Feature(label="NVIDIA GPUs", gpus=True),
    *(Feature(label=f"`train.precision: {name}`", train={"precision": name}) for name in ("fp32", "bf16", "fp16")),
    Feature(label="`train.clip_grad_norm`", train={"clip_grad_norm": 1.0}),
    Feature(label="`train.activation_checkpointing: full`", train={"activation_checkpointing": "full"}),
    Feature(label="`train.compile`", train={"compile": True}),
    Feature(label="`train.exact`", train={"exact": ExactConfig(shards=8)}),
    Feature(label="`train.exact` with `train.compile`", train={"exact": ExactConfig(shards=8), "compile": True}),
    Feature(label="`replicate: 2`", strategy={"replicate": 2}),
    Feature(label="`shard: 2`", strategy={"shard": 2}),
    Feature(label="`tensor: 2`", strategy={"tensor": 2}),
    Feature(label="`tensor: 2, sequence_parallel: true`", strategy={"tensor": 2, "sequence_parallel": True}),
    Feature(label="`tensor: 2` with `train.compile`", strategy={"tensor": 2}, train={"compile": True}),
    Feature(label="`tensor: 2` with `train.exact`", strategy={"tensor": 2}, train={"exact": ExactConfig(shards=8)}),
    Feature(label="`pipeline: 2`", strategy={"pipeline": 2}, train={"micro_batch": 4}),
    Feature(label="`pipeline: 2, tensor: 2`", strategy={"pipeline": 2, "tensor": 2}, train={"micro_batch": 4}),
    Feature(label="`model.deferred_init`", deferred_init=True),
    Feature(
        label="`model.deferred_init` with `pipeline: 2, tensor: 2`",
        strategy={"pipeline": 2, "tensor": 2},
        train={"micro_batch": 4},
        deferred_init=True,
    ),
    Feature(label="`offload: cpu`", strategy={"offload": "cpu"}),
)


def refusal(name: str, feature: Feature) -> str:
    """The words of a launch; "" where it starts. What this machine has does not count: the job is a Slurm one, whose
    nodes have a Python of their own."""
    ranks = 1 if name == "single" else 2
    cluster = ClusterConfig(
        backend="slurm", nodes=ranks, procs_per_node=ranks, gpus_per_node=ranks * feature.gpus, python="/nodes/python"
    )
    values = {
        "model": ModelConfig(target=Target(target="any", kwargs={}), deferred_init=feature.deferred_init),
        "train": TrainConfig(steps=100, **feature.train),
        "strategy": StrategyConfig(name=name, **feature.strategy),  # type: ignore[arg-type]
        "cluster": cluster,
        "data": DataConfig(train=Target(target="any", kwargs={}), batch_size=32),
    }
    problems = check_sections(values, lambda key: key, gpus=0, cores=ranks)
    return " ".join(f"{problem.key}: {problem.message}" for problem in problems)


def render() -> str:
    """The whole page."""
    notes: dict[str, int] = {}
    rows = [_row([f"**{feature.label}**", *(_cell(name, feature, notes) for name in CAPS)]) for feature in FEATURES]
    optimizers = ["no: it is refused" if caps.elementwise_optimizer else "yes" for caps in CAPS.values()]
    packages = [", ".join(package.module for package in caps.needs) or "none" for caps in CAPS.values()]
    rows.append(_row(["**an optimizer whose update is not elementwise** (Muon, Adafactor, LBFGS)", *optimizers]))
    rows.append(_row(["**packages besides torch**", *packages]))
    table = [_row(["", *(f"`{name}`" for name in CAPS)]), _row(["---"] * (len(CAPS) + 1)), *rows]
    listed = [f"{number}. {words}" for words, number in notes.items()]
    install = {f"- {package.module}: {package.install}" for caps in CAPS.values() for package in caps.needs}
    return "\n".join([_HEAD, *table, "", *listed, "", *sorted(install), "", _ANYWHERE])


def _cell(name: str, feature: Feature, notes: dict[str, int]) -> str:
    words = re.sub(rf"\b{name}\b", "NAME", refusal(name, feature))  # as the others say it, where they do
    return "yes" if not words else f"no ({notes.setdefault(words, len(notes) + 1)})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(render(), end="")
