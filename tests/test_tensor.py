"""strategy.tensor: layers cut over neighbouring ranks, with ddp and fsdp over the others, learn what one process
learns. How they go on from checkpoints, their own and others': test_any_layout.py and test_relaunch.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import (
    Ask,
    Run,
    events,
    failure,
    failures,
    losses,
    metrics,
    prepare,
    rank_functions,
    rank_runner,
    worst_difference,
)
from parity import TOLERANCE as PARITY_TOLERANCE

TOLERANCE = 2e-6  # sums over parts of a layer, in another order

LAYOUTS = {
    "tensor": ("{name: ddp, tensor: 2}", 2),
    "sequence": ("{name: ddp, tensor: 2, sequence_parallel: true}", 2),
    "ddp": ("{name: ddp, tensor: 2, sequence_parallel: true}", 4),
    "fsdp": ("{name: fsdp, tensor: 2}", 4),
}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


@pytest.fixture(scope="module")
def train(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The run directory of a layout's 50 steps; each is trained once."""
    done: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in done:
            strategy, size = LAYOUTS.get(name, (name, 1))
            folder = tmp_path_factory.mktemp(name) / "run"
            prepare(folder, f"strategy={strategy}", f"cluster.procs_per_node={size}")
            assert run(folder, size) == [0] * size
            done[name] = folder
        return done[name]

    return once


@pytest.mark.parametrize("name", LAYOUTS)
def test_parity(train: Train, name: str) -> None:
    folder, reference = train(name), train("single")
    assert worst_difference(losses(folder), losses(reference)) <= TOLERANCE
    norms, wanted = ([r["grad_norm"] for r in metrics(f)] for f in (folder, reference))
    assert norms == pytest.approx(wanted, rel=1e-4)
    (chosen,) = events(folder, "chosen")
    assert any("tensor 2: 10 modules cut by the shapes of its layers" in line for line in chosen["lines"])


@pytest.fixture(scope="module")
def ask() -> Ask:
    return rank_functions(module="tensor_functions")


def test_a_block_takes_no_more_than_its_four_sums(ask: Ask) -> None:
    """Two in the forward, two in the backward, as Megatron has it: q, k and v in one layer gather nothing."""
    for found in ask("collectives", 2):
        assert found == {"all_reduce": 2 * 4, "all_gather_into_tensor": 0}


def test_its_output_may_be_written_to(ask: Ask) -> None:
    assert ask("output", 2) == [True, True]


def test_its_output_is_plain_whatever_holds_it(ask: Ask) -> None:
    assert ask("answers", 2) == [True, True]


def test_attention_takes_masks_of_any_shape(ask: Ask) -> None:
    assert ask("masks", 2) == [[True] * 8] * 2


def test_gradients_that_lie_elsewhere_or_are_summands(ask: Ask) -> None:
    assert ask("elsewhere", 2) == [[True] * 10] * 2


def test_the_padding_entry_of_a_cut_embedding_gets_no_gradient(ask: Ask) -> None:
    assert ask("padding", 2) == [True, True]


def test_what_a_stage_lacks_is_not_made_up_from_what_it_has(ask: Ask) -> None:
    assert ask("absent", 2) == [True, True]


def test_it_computes_again_and_in_bf16(run: Run, tmp_path: Path) -> None:
    how = ["train.steps=5", "train.precision=bf16", "train.activation_checkpointing=full"]
    alone = prepare(tmp_path / "alone", *how)
    assert run(alone, 1) == [0]
    cut = prepare(tmp_path / "cut", f"strategy={LAYOUTS['sequence'][0]}", "cluster.procs_per_node=2", *how)
    assert run(cut, 2) == [0, 0]
    assert worst_difference(losses(cut), losses(alone)) <= PARITY_TOLERANCE["bf16"]


def huggingface(name: str) -> dict[str, Any]:
    return {
        "model": {"_target_": "hf.from_config", "name": name},
        "data": {"train": {"_target_": "hf.Samples", "name": name}, "batch_size": 8},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
        "train": {"steps": 10, "clip_grad_norm": 1.0},
    }


@pytest.fixture(scope="module")
def run_huggingface() -> Run:
    return rank_runner(preload=("hf",))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("llama", "tensor 2: 16 modules cut by the model's own plan"),
        ("gpt2", "tensor 2: 10 modules cut by the shapes of its layers"),
    ],
)
def test_models_that_nobody_here_wrote(run_huggingface: Run, tmp_path: Path, name: str, line: str) -> None:
    base = huggingface(name)
    alone = prepare(tmp_path / "alone", base=base)
    assert run_huggingface(alone, 1) == [0]
    cut = prepare(tmp_path / "cut", "strategy={name: ddp, tensor: 2}", "cluster.procs_per_node=2", base=base)
    assert run_huggingface(cut, 2) == [0, 0]
    assert worst_difference(losses(cut), losses(alone)) <= TOLERANCE
    (chosen,) = events(cut, "chosen")
    assert line in json.dumps(chosen["lines"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.heads=1"], "strategy: tensor 2 does not divide the 1 heads of blocks.0 (heads)"),
        (["data.train.seq=15", "strategy.sequence_parallel=true"], "sequences of 15 are not divided by tensor 2"),
        (["optimizer={_target_: torch.optim.Adafactor}"], "Adafactor is not elementwise: it would change"),
    ],
)
def test_what_only_the_model_tells_is_refused_in_words(
    run: Run, tmp_path: Path, changes: list[str], message: str
) -> None:
    folder = prepare(tmp_path / "run", "strategy={name: ddp, tensor: 2}", "cluster.procs_per_node=2", *changes)
    assert 93 in run(folder, 2)
    said = [record["message"] for record in failures(folder)]
    assert any(message in words for words in said), said


def test_what_cut_tensors_cannot_do_is_said_with_the_way_out(run: Run, tmp_path: Path) -> None:
    how = ["model._target_=tensor_functions.Counting", "strategy={name: ddp, tensor: 2}", "cluster.procs_per_node=2"]
    folder = prepare(tmp_path / "run", *how)
    assert run(folder, 2) != [0, 0]
    report = failure(folder)
    assert "nonzero" in report["message"]
    assert "strategy.tensor: the model's parameters and activations are torch's DTensors" in report["message"]
    assert "set tensor: 1" in report["message"]
