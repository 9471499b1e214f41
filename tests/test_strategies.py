"""Odd models give the numbers of one process, or are refused in words; any optimizer's state resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Ask, rank_functions

from dtrain.strategies.ddp import BucketedAllReduce

ASSETS = Path(__file__).parent / "assets"
LAYOUTS = [("ddp", 2, 1), ("ddp", 3, 3), ("fsdp", 2, 1), ("fsdp", 3, 3)]  # strategy, ranks, micro-batches

pytestmark = [pytest.mark.e2e]


@pytest.fixture(scope="module")
def ask() -> Ask:
    """ask(name, world_size, ...): what odd_models.<name> returns on each rank."""
    return rank_functions(module="odd_models")


@pytest.fixture(scope="module")
def learned(ask: Ask) -> Callable[..., list[Any]]:
    """learned(strategy, world_size, parts): what each rank has learned, by model."""

    @functools.cache
    def learn(strategy: str, world_size: int, parts: int = 1) -> list[Any]:
        return ask("learn_each", world_size, models=MODELS, strategy=strategy, parts=parts)

    return learn


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


MODELS = ["Branches", "tied_across", "reused", "frozen", "two_dtypes", "sequential", "Scalar", "ChannelsLast"]
REFUSED = {("Scalar", "fsdp"): ["scale", "(1,)"], ("ChannelsLast", "fsdp"): ["conv.weight", "strides"]}


@pytest.mark.parametrize("model", MODELS)
def test_odd_models_learn_what_one_process_learns(learned: Callable[..., list[Any]], model: str) -> None:
    """With momentum and weight decay: a gradient of zeros and no gradient at all are not the same."""
    one = learned("single", 1)[0][model]
    for strategy, world_size, parts in LAYOUTS:
        for found in (rank[model] for rank in learned(strategy, world_size, parts)):
            if (model, strategy) in REFUSED:
                assert found["error"] == "UsageError"
                assert all(word in found["message"] for word in REFUSED[model, strategy])
                continue
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-5), (strategy, world_size)
            assert found["norms"] == pytest.approx(one["norms"], rel=1e-5), (strategy, world_size)
            assert list(found["parameters"]) == list(one["parameters"])
            for name, values in one["parameters"].items():
                assert flat(found["parameters"][name]) == pytest.approx(flat(values), abs=1e-6), (strategy, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_buffers_that_change_are_one_on_all_ranks(ask: Ask, strategy: str) -> None:
    ranks = ask("learn_each", 3, models=["Codebook", "normed"], strategy=strategy, parts=1)
    for model, found in ranks[0].items():
        assert found["buffers"]
        assert all(rank[model]["buffers"] == found["buffers"] for rank in ranks), model


OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD"},
    {"name": "SGD", "momentum": 0.9, "nesterov": True},
    {"name": "Adam", "foreach": True},
    {"name": "AdamW", "fused": True},
    {"name": "AdamW", "amsgrad": True, "foreach": False},
    {"name": "NAdam"},
    {"name": "Aging"},
    {"name": "Adagrad"},
    {"name": "RMSprop", "momentum": 0.9, "centered": True},
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_optimizers_state_resumes_to_the_same_bits(ask: Ask, tmp_path: Path, strategy: str) -> None:
    """And state of another dtype than its parameter: NAdam keeps a product in float32 for parameters of any dtype,
    which torch would load in the parameter's."""
    kinds = [("frozen", optimizer) for optimizer in OPTIMIZERS]
    if strategy == "ddp":
        kinds.append(("two_dtypes", {"name": "NAdam"}))
    cases = [
        {"model": model, "strategy": strategy, "folder": str(tmp_path / str(number)), "optimizer": optimizer}
        for number, (model, optimizer) in enumerate(kinds)
    ]
    whole, resumed = (ask("resume_each", 2, save=save, cases=cases) for save in (True, False))
    for rank, again in zip(whole, resumed, strict=True):
        for case, wanted, found in zip(cases, rank, again, strict=True):
            assert wanted[0][0] > 0
            assert found == wanted, case


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_all_ranks_hold_leaves_the_store_once(ask: Ask, tmp_path: Path, strategy: str) -> None:
    found = ask("restore_big", 3, folder=str(tmp_path), strategy=strategy)
    assert [rank["same"] for rank in found] == [True] * 3
    read = sum(rank["bytes"] for rank in found)
    assert read < 1.5 * found[0]["stored"]  # a checksum block that two pieces share is read twice


def test_damage_that_one_rank_reads_is_known_to_all(ask: Ask, tmp_path: Path) -> None:
    found = ask("restore_big", 3, folder=str(tmp_path), strategy="ddp", damage=True)
    assert [rank["error"] for rank in found] == ["CorruptCheckpoint"] * 3
    assert len({rank["message"] for rank in found}) == 1


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """Fused optimizers walk both as flat memory."""
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sync = BucketedAllReduce(list(convolution.parameters()))
    sync.zero()
    images = torch.rand(2, 3, 8, 8)  # the gradient that autograd makes for these is not channels last
    output = torch.nn.functional.conv2d(images, convolution.weight.contiguous(), convolution.bias)
    torch.autograd.backward(output.sum())
    assert convolution.weight.grad.stride() == convolution.weight.stride() != (27, 9, 3, 1)


def test_sparse_gradients_add_up_as_dense_ones_do() -> None:
    """Over two micro-batches, and with nothing left of the step before."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    sync = BucketedAllReduce(list(table.parameters()))
    for rows in ([0, 1, 1], [3]):
        sync.zero()
        for factor in (1.0, 2.0):
            torch.autograd.backward(factor * table(torch.tensor(rows)).sum())
        counts = torch.bincount(torch.tensor(rows), minlength=5).float()
        assert table.weight.grad is not None
        assert torch.equal(table.weight.grad, 3.0 * counts[:, None].expand(5, 2))
