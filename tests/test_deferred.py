"""Models that are built on paper begin with the bits of those that are built whole, and take no more memory than a
rank's part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deferred_models
import parity
import pytest
import torch
from cases import PARITY, Ask, Run, numbers, prepare, rank_functions, rank_runner

from dtrain.strategies.deferred import Deferred

MODELS: dict[str, Any] = {
    "parity": parity.Transformer,
    "gpt2": deferred_models.gpt2,
    "llama": deferred_models.llama,
    "bert": deferred_models.bert,
    "vit": deferred_models.vit,
    "odd": deferred_models.Odd,
}

HEAVY: dict[str, Any] = {
    **PARITY,
    "model": "deferred_models.Heavy",
    "data": {"train": "deferred_models.Vectors", "batch_size": 16},
    "optimizer": "torch.optim.SGD",
}


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


@pytest.fixture(scope="module")
def ask() -> Ask:
    return rank_functions(module="deferred_models")


@pytest.mark.parametrize("large_bytes", [1 << 10, 16 << 10])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_gets_the_bits_of_the_whole_model(name: str, large_bytes: int) -> None:
    torch.manual_seed(0)
    whole = MODELS[name]()
    drawn = torch.rand(3)
    torch.manual_seed(0)
    with Deferred(large_bytes) as deferred:
        model = MODELS[name]()
    assert torch.equal(torch.rand(3), drawn), "what is drawn afterwards is what it would be"
    wanted = [*whole.named_parameters(), *whole.named_buffers()]
    found = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (name, one), (_, other) in zip(wanted, found, strict=True):
        value = deferred.value(other)
        assert torch.equal(one, value), name
        assert (value.dtype, value.stride(), other.requires_grad) == (one.dtype, one.stride(), one.requires_grad), name
    assert any(tensor.is_meta for _, tensor in found)


def test_a_value_that_is_read_while_building_is_real() -> None:
    with Deferred(0) as deferred:
        weight = torch.ones(8, 8)
        weight.mul_(3)
        weight[2, 3] = 7.0
        total = float(weight.sum())
        looks = (weight.is_meta, weight.device.type)
    assert total == 63 * 3 + 7
    assert looks == (False, "cpu")
    assert weight.is_meta
    assert float(deferred.value(weight)[2, 3]) == 7.0


def test_what_an_operation_was_called_with_may_change_afterwards() -> None:
    """A small tensor, which is real; the tensor itself; and another one that is on paper."""
    with Deferred(200) as deferred:
        small, weight, other = torch.arange(8.0), torch.zeros(8, 8), torch.ones(8, 8)
        weight[0] = small
        small.zero_()
        weight.copy_(weight.detach())
        small.copy_(weight[0]).mul_(2)
        other.add_(weight)
        weight.zero_()
        torch._foreach_sub_([weight, other], 1.0)
    assert weight.is_meta
    assert not small.is_meta
    assert torch.equal(small, 2 * torch.arange(8.0))
    assert torch.equal(deferred.value(other)[0], torch.arange(8.0))
    assert torch.equal(deferred.value(weight), -torch.ones(8, 8))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("{name: fsdp, replicate: 2}", 4),
        ("ddp", 2),
        ("{name: ddp, tensor: 2}", 2),
        ("{name: ddp, pipeline: 2}", 2),
        ("{name: fsdp, pipeline: 2, tensor: 2}", 4),
    ],
)
def test_a_run_is_the_same_to_the_bit(run: Run, tmp_path: Path, layout: str, size: int) -> None:
    found = []
    for deferred in ("false", "true"):
        folder = prepare(
            tmp_path / deferred,
            f"strategy={layout}",
            f"cluster.procs_per_node={size}",
            f"model.deferred_init={deferred}",
            "train.steps=2",
            base={**PARITY, "schedule": "constant"},
        )
        assert run(folder, size) == [0] * size
        found.append(numbers(folder))
    assert found[0] == found[1]


@pytest.mark.e2e
def test_no_rank_holds_the_whole_model(ask: Ask, tmp_path: Path) -> None:
    """Whichever way it is cut."""
    found: dict[tuple[str, str], int] = {}
    for layout, deferred in (
        ("fsdp", "false"),
        ("fsdp", "true"),
        ("{name: ddp, pipeline: 2, tensor: 2, tensor_plan: {'layers.*': column}}", "true"),
    ):
        small, folder = (
            prepare(
                tmp_path / f"{len(found)}-{width}",
                f"strategy={layout}",
                "cluster.procs_per_node=4",
                f"model.deferred_init={deferred}",
                f"model.width={width}",
                f"data.train.width={width}",
                base=HEAVY,
            )
            for width in (300, 1448)
        )
        found[layout, deferred] = max(ask("peak_bytes", 4, small=str(small), folder=str(folder)))
    whole = 16 * 1448 * 1448 * 4
    assert found.pop(("fsdp", "false")) > whole, "the measure sees it"
    assert max(found.values()) < 0.6 * whole, f"a quarter of it, and one layer at a time: {found}"
