"""init_from over ranks: every layout gets the same weights, no byte leaves the store twice, all ranks fail together;
and frozen parameters stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Ask, rank_functions
from safetensors.torch import save_file

from dtrain.cluster.errors import UsageError
from dtrain.runtime.build import build_model, make_optimizer
from dtrain.runtime.config import OptimizerConfig, Target
from dtrain.runtime.modelconfig import ModelConfig

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="module")
def ask() -> Ask:
    """ask(name, world_size, ...): what weight_functions.<name> returns on each rank."""
    return rank_functions(module="weight_functions")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The parity model's weights: (a folder of two files, some tensors in bf16; the state that they shall give)."""
    monkeypatch.syspath_prepend(str(ASSETS))
    import parity

    torch.manual_seed(0)
    state = parity.Transformer().state_dict()
    half = {name: tensor.bfloat16() if "qkv" in name else tensor for name, tensor in state.items()}
    folder = tmp_path / "weights"
    folder.mkdir()
    names = list(half)
    save_file({name: half[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: half[name] for name in names[1::2]}, folder / "b.safetensors")
    wanted = {name: tensor.to(state[name].dtype) for name, tensor in half.items()}
    torch.save(wanted, tmp_path / "wanted.pt")
    return str(folder), str(tmp_path / "wanted.pt")


@pytest.mark.e2e
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)])
def test_every_layout_gets_the_weights_and_no_byte_is_read_twice(
    ask: Ask, weights: tuple[str, str], strategy: str, world_size: int
) -> None:
    folder, wanted = weights
    found = ask("initialize", world_size, folder=folder, strategy=strategy, wanted=wanted)
    assert [rank["same"] for rank in found] == [True] * world_size
    assert found[0]["dtypes"] == ["torch.float32", "torch.int64"]
    # A tied tensor is stored under both of its names, and read under one.
    assert sum(rank["bytes"] for rank in found) == found[0]["stored"]
    assert min(rank["bytes"] for rank in found) > 0.5 * found[0]["stored"] / world_size


@pytest.mark.e2e
def test_a_store_that_fails_one_rank_fails_all(ask: Ask, weights: tuple[str, str]) -> None:
    found = ask("fail_to_read", 2, folder=weights[0])
    assert [rank["error"] for rank in found] == ["StorageError"] * 2
    assert all("the store has gone" in rank["message"] for rank in found)


def model(**more: Any) -> ModelConfig:
    return ModelConfig(target=Target(target="parity.Transformer", kwargs={"layers": 1}), **more)


def test_frozen_parameters_are_left_out_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ASSETS))
    found = build_model(model(frozen=("embed.*", "*norm*")), seed=0)
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in found.named_parameters()} - trained >= {"embed.weight", "blocks.0.norm1.weight"}
    assert "blocks.0.qkv.weight" in trained
    optimizer = make_optimizer(OptimizerConfig(target=Target(target="torch.optim.SGD", kwargs={"lr": 0.1})), found)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [(("embd.*",), "'embd.*' matches no parameter. There are: "), (("*",), "that model.frozen leaves")],
)
def test_frozen_patterns_that_cannot_be_meant(
    monkeypatch: pytest.MonkeyPatch, patterns: tuple[str, ...], words: str
) -> None:
    monkeypatch.syspath_prepend(str(ASSETS))
    with pytest.raises(UsageError) as caught:
        build_model(model(frozen=patterns), seed=0)
    assert words in str(caught.value)
