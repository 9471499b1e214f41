"""How a step computes: half precision, activation checkpointing, torch.compile, accumulation. Each gives the losses of
one process, within a tolerance that belongs to its precision; see parity.TOLERANCE."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    Ask,
    Run,
    events,
    failure,
    losses,
    metrics,
    numbers,
    prepare,
    rank_functions,
    rank_runner,
    worst_difference,
)
from parity import TOLERANCE, Transformer
from torch import nn

from dtrain.cluster.errors import ConfigError, UsageError
from dtrain.launcher.compose import load_config
from dtrain.strategies.caps import Caps, refused
from dtrain.strategies.forwards import prepare_forwards
from dtrain.strategies.lossscale import GROWTH_INTERVAL_STEPS, LossScale
from dtrain.strategies.units import units

DDP, FSDP = {"name": "ddp"}, {"name": "fsdp"}
HSDP = {"name": "fsdp", "replicate": 2}


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.fixture(scope="module")
def run(compiled_code: dict[str, str]) -> Run:
    return rank_runner(compiled_code)


@pytest.fixture(scope="module")
def run_without_compiler() -> Run:
    return rank_runner({"CXX": "no-such-compiler"})


@pytest.fixture(scope="module")
def ask(compiled_code: dict[str, str]) -> Ask:
    return rank_functions(compiled_code)


@pytest.fixture(scope="module")
def one_process(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of one process by precision, computed once."""
    known: dict[str, list[float]] = {}

    def curve(precision: str) -> list[float]:
        if precision not in known:
            folder = prepare(tmp_path_factory.mktemp(precision) / "run", f"train.precision={precision}")
            assert run(folder, 1) == [0]
            known[precision] = losses(folder)
        return known[precision]

    return curve


# ---- precision ----


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "fp16"), ("fsdp", "bf16")])
def test_half_precision_is_as_near_as_its_rounding(
    run: Run, one_process: Callable[[str], list[float]], tmp_path: Path, strategy: str, precision: str
) -> None:
    folder = prepare(tmp_path / "run", f"strategy={strategy}", f"train.precision={precision}")
    assert run(folder, 2) == [0, 0]
    assert worst_difference(losses(folder), one_process(precision)) <= TOLERANCE[precision]
    assert worst_difference(losses(folder), one_process("fp32")) <= TOLERANCE[precision]
    assert losses(folder) != one_process("fp32"), "it did compute in another precision"
    manifest = json.loads(next((folder / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert {tensor["dtype"] for tensor in manifest["tensors"].values()} == {"F32", "I64"}


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fp16_resumes_to_the_same_bits_with_its_loss_scale(run: Run, tmp_path: Path, strategy: str) -> None:
    """Steps that overflow are skipped on the way, before and after the checkpoint."""
    more = ["train.precision=fp16", "loss=parity.steep_loss", "train.steps=12", "train.clip_grad_norm=null"]
    whole = prepare(tmp_path / "whole", f"strategy={strategy}", *more, "checkpoint.every=4")
    assert run(whole, 2) == [0, 0]
    skipped = [record["step"] for record in metrics(whole) if record.get("skipped")]
    assert skipped[0] < 4 < skipped[-1] < 12
    assert all(record["grad_norm"] is None and record["loss"] for record in metrics(whole) if record.get("skipped"))
    halves = prepare(tmp_path / "halves", f"strategy={strategy}", *more, f"checkpoint.url={whole / 'checkpoints'}")
    assert run(halves, 2, attempt=2, resume=[4, 1]) == [0, 0]
    assert numbers(halves) == numbers(whole)[4:]
    manifest = json.loads((whole / "checkpoints" / "step-00000004-a0001" / "manifest.json").read_text())
    assert manifest["state"]["loss_scale"] == {"scale": metrics(whole)[4]["loss_scale"], "good_steps": 0}


@pytest.mark.e2e
@pytest.mark.parametrize(("config", "world_size"), [(DDP, 2), (FSDP, 3), (HSDP, 4)])
def test_one_rank_that_overflows_skips_the_step_on_all(ask: Ask, config: dict[str, Any], world_size: int) -> None:
    found = ask("computing.overflow", world_size, config=config, scale=2.0**14, rank=1)
    assert all(each == found[0] for each in found)
    skipped = [skip for _, skip in found[0]["steps"]]
    assert skipped[0]
    assert not skipped[-1]
    assert found[0]["changed"] == [not skip for skip in skipped]
    assert found[0]["updates"] == [skipped.count(False)]
    assert [scale for scale, _ in found[0]["steps"]] == [2.0 ** (14 - sum(skipped[:step])) for step in range(8)]
    calm = ask("computing.overflow", world_size, config=config, scale=2.0**14, rank=-1)
    assert [skip for _, skip in calm[0]["steps"]] == [False] * 8, "it was that rank's samples"


@pytest.mark.e2e
def test_a_scale_that_falls_without_end_stops_with_the_reason(ask: Ask) -> None:
    for step, message in ask("computing.hopeless", 2, config=DDP):
        assert step == 31  # from 2**16 down to 2**-14
        assert all(word in message for word in ("loss is", "loss scale of 6.10352e-05", "train.precision: bf16"))


def test_the_scale_grows_after_many_good_steps() -> None:
    scale = LossScale(value=8.0)
    for _ in range(GROWTH_INTERVAL_STEPS):
        assert scale.value == 8.0
        scale.update(finite=True)
    assert (scale.value, scale.good_steps) == (16.0, 0)
    scale.update(finite=True)
    scale.update(finite=False)
    assert scale.state() == {"scale": 8.0, "good_steps": 0}


# ---- activation checkpointing ----


@pytest.mark.e2e
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_changes_no_bit(
    run: Run, tmp_path: Path, strategy: str, world_size: int, precision: str
) -> None:
    """With dropout: the second forward draws the first one's numbers."""
    more = ["train.steps=6", "model.dropout=0.1", "schedule.warmup=2", f"train.precision={precision}"]
    found = []
    for kind in ("none", "full"):
        folder = prepare(tmp_path / kind, f"strategy={strategy}", *more, f"train.activation_checkpointing={kind}")
        assert run(folder, world_size) == [0] * world_size
        found.append(numbers(folder))
    assert found[0] == found[1]
    (chosen,) = events(folder, "chosen")
    assert chosen["lines"][0].endswith(f"{precision}, activation checkpointing full")


def test_a_unit_keeps_its_input_alone_and_its_names() -> None:
    torch.manual_seed(0)
    model = Transformer(layers=3)
    names = [name for name, _ in model.named_parameters()]
    tokens = torch.arange(32).view(2, 16)
    plain = _saved_bytes(model, tokens)
    prepare_forwards(model, units(model, ()), checkpointing=True, compiled=False)
    assert [name for name, _ in model.named_parameters()] == names
    assert _saved_bytes(model, tokens) < plain / 2
    assert type(model.blocks[0]).__name__ == "Block"
    assert type(model.blocks[0]) is type(model.blocks[1])


def _saved_bytes(model: nn.Module, tokens: torch.Tensor) -> int:
    """What autograd keeps between forward and backward, without the parameters."""
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens)
    del output
    return sum(sizes.values())


def test_a_copy_of_a_unit_computes_with_its_own_weights() -> None:
    model = Transformer(layers=1)
    prepare_forwards(model, units(model, ()), checkpointing=True, compiled=False)
    other = copy.deepcopy(model)
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        assert not torch.equal(model(tokens), other(tokens))


def test_a_forward_that_was_replaced_on_the_object_is_kept() -> None:
    block = nn.Linear(2, 2)
    vars(block)["forward"] = lambda x: 3 * x
    prepare_forwards(nn.ModuleList([block]), [("0", block)], checkpointing=True, compiled=False)
    assert block(torch.ones(1)).item() == 3


def test_a_model_without_units_is_refused() -> None:
    with pytest.raises(UsageError, match=r"activation_checkpointing.*strategy\.wrap"):
        prepare_forwards(nn.Linear(2, 2), [], checkpointing=True, compiled=False)


# ---- torch.compile ----


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("strategy", "checkpointing"), [("ddp", "none"), ("fsdp", "full")])
def test_compiled_units_learn_what_one_process_learns(
    run: Run, one_process: Callable[[str], list[float]], tmp_path: Path, strategy: str, checkpointing: str
) -> None:
    more = ["train.compile=true", f"train.activation_checkpointing={checkpointing}"]
    folder = prepare(tmp_path / "run", f"strategy={strategy}", *more)
    assert run(folder, 2) == [0, 0]
    assert worst_difference(losses(folder), one_process("fp32")) <= TOLERANCE["fp32"]
    (chosen,) = events(folder, "chosen")
    assert chosen["lines"][0].endswith("compiled")


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_equal_units_and_uneven_micro_batches_share_graphs(ask: Ask) -> None:
    """Three blocks, micro-batches of 1 to 4 samples: a graph for one sample, and one for any other number."""
    wanted = ask("computing.eager", 1, config={"name": "single"})[0]
    for found in ask("computing.graphs", 2, config=DDP, checkpointing=False):
        assert found["losses"] == pytest.approx(wanted, rel=1e-5)
        assert found["graphs"] <= 2


def test_a_missing_compiler_is_found_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        prepare(folder, "train.compile=true")
    (problem,) = caught.value.problems
    assert (problem.key, "no-such-compiler" in problem.message) == ("train.compile", True)
    assert load_config(folder / "cfg.yaml", []).run.train.compile is False


@pytest.mark.e2e
def test_a_missing_compiler_on_a_node_is_said_and_not_tried_again(run_without_compiler: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "train.compile=true")
    assert run_without_compiler(folder, 1) == [93]
    assert "no-such-compiler" in failure(folder)["message"]


# ---- accumulation ----


@pytest.mark.e2e
@pytest.mark.parametrize(("config", "world_size"), [(DDP, 2), (FSDP, 2), (HSDP, 4)])
def test_gradients_are_reduced_once_a_step(ask: Ask, config: dict[str, Any], world_size: int) -> None:
    """However many micro-batches: an all-reduce a bucket, a reduce-scatter a unit (and an all-reduce over copies)."""
    for found in (ask("computing.collectives", world_size, config=config, parts=parts)[0] for parts in (1, 3)):
        reductions = {name: count for name, count in found.items() if "gather" not in name}
        units_and_rest = 4  # three blocks, and what lies around them
        wanted: dict[str, dict[str, int]] = {
            "ddp": {"allreduce_": 1},
            "fsdp": {"_reduce_scatter_base_": units_and_rest},
        }
        both = wanted[config["name"]] | ({"allreduce_": units_and_rest} if "replicate" in config else {})
        assert reductions == both


# ---- what a strategy can't ----


def test_what_does_not_go_with_a_strategy_is_told() -> None:
    caps = Caps(devices=frozenset({"cuda"}), precisions=frozenset({"bf16"}), checkpointing=False, compile=False)
    told = refused("other", caps, device_type="cpu", precision="fp16", checkpointing=True, compiled=True)
    assert told == [
        "other does not run on cpu, only on cuda",
        "other does not compute in fp16, only in bf16",
        "other does not go with train.activation_checkpointing: set none",
        "other does not go with train.compile: set false",
    ]
    assert refused("other", caps, device_type="cuda", precision="bf16", checkpointing=False, compiled=False) == []
