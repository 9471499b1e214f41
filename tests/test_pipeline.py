"""Pipelines: the losses of one process with every schedule and in every company, and what is refused. How they go on
from checkpoints, their own and others': test_any_layout.py and test_relaunch.py."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import PARITY, Run, events, failure, losses, metrics, numbers, prepare, rank_runner, worst_difference
from staged_models import (
    Again,
    Around,
    Counts,
    Direct,
    Drops,
    Fork,
    Hides,
    Lists,
    Looks,
    Mixed,
    Named,
    Pairs,
    Row,
    Skips,
    Writes,
)
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.launcher.compose import load_config
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.strategies.absent import NeedsValues, absent_like, is_absent
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec, whole
from dtrain.strategies.pipelinecut import StagedModel, make_cut
from dtrain.strategies.pipelinesplit import balance, imbalance, refused_micro_batches
from dtrain.strategies.pipelinestate import decode, encode
from dtrain.strategies.pipelinetrace import Skeleton, Trace

TOLERANCE = 5e-6
BASE: dict[str, Any] = {
    **PARITY,
    "model": {"_target_": "parity.Transformer", "vocab": 96, "width": 32, "layers": 4, "heads": 4, "seq": 8},
    "data": {
        "train": {"_target_": "parity.Tokens", "vocab": 96, "seq": 8},
        "eval": {"_target_": "parity.Tokens", "vocab": 96, "seq": 8, "samples": 21},
        "batch_size": 13,
    },
    "schedule": "constant",  # so that fewer steps are the first of more
    "train": {"steps": 50, "clip_grad_norm": 1.0, "micro_batch": 4, "eval_every": 10},
    "checkpoint": {"every": None},
}
ROW: dict[str, Any] = {
    "model": {"_target_": "staged_models.Row"},
    "loss": "staged_models.loss",
    "metrics": "staged_models.errors",
    "data": {
        "train": {"_target_": "staged_models.Points"},
        "eval": {"_target_": "staged_models.Points"},
        "batch_size": 16,
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
    "train": {"steps": 4, "clip_grad_norm": 0.1, "micro_batch": 4, "eval_every": 4},
}
TWO_BY_TWO = "{name: fsdp, pipeline: 2}"

e2e = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner(preload=["parity", "hf", "staged_models"])


@pytest.fixture(scope="module")
def reference(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("one") / "run", base=BASE)
    assert run(folder, 1) == [0]
    return folder


def piped(folder: Path, strategy: str, size: int, *overrides: str, base: dict[str, Any] = BASE) -> Path:
    return prepare(folder, f"strategy={strategy}", f"cluster.procs_per_node={size}", *overrides, base=base)


def assert_same_curve(folder: Path, reference: Path) -> None:
    """As far as `folder` has got."""
    steps = len(losses(folder))
    assert worst_difference(losses(folder), losses(reference)[:steps]) <= TOLERANCE
    norms, wanted = ([r["grad_norm"] for r in metrics(each)] for each in (folder, reference))
    assert norms == pytest.approx(wanted[:steps], rel=1e-4)
    values = evaluated(folder)
    assert values == pytest.approx(evaluated(reference)[: len(values)], rel=TOLERANCE)
    assert values


def evaluated(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [value for record in records for key, value in record.items() if key in ("loss", "error")]


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "size", "steps"),
    [
        ("{name: ddp, pipeline: 3}", 3, 10),
        ("{name: ddp, pipeline: 2, pipeline_schedule: interleaved}", 2, 50),
        ("{name: ddp, pipeline: 2, pipeline_schedule: gpipe, pipeline_split: [blocks.1]}", 4, 10),
        ("{name: fsdp, pipeline: 2, pipeline_schedule: interleaved}", 4, 10),
        ("{name: ddp, pipeline: 2, tensor: 2}", 4, 50),
        (TWO_BY_TWO, 4, 50),
    ],
)
def test_a_pipeline_learns_what_one_process_learns(
    run: Run, reference: Path, tmp_path: Path, strategy: str, size: int, steps: int
) -> None:
    """Tied embedding and head, two groups, clipping, accumulation, micro-batches of different sizes."""
    folder = piped(tmp_path / "run", strategy, size, f"train.steps={steps}")
    assert run(folder, size) == [0] * size
    assert_same_curve(folder, reference)


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["{name: ddp, pipeline: 2}", TWO_BY_TWO])
def test_frozen_unused_and_shared_parameters_and_statistics(run: Run, tmp_path: Path, strategy: str) -> None:
    """Every stage holds what it needs, and what is saved is what one process saves."""
    base = {**ROW, "model": {"_target_": "staged_models.Mixed"}, "checkpoint": {"every": 4}}
    one = prepare(tmp_path / "one", base=base)
    other = piped(tmp_path / "other", strategy, 2, base=base)
    assert run(one, 1) == [0]
    assert run(other, 2) == [0, 0]
    assert_same_curve(other, one)
    saved, wanted = tensors_in(other, 4), tensors_in(one, 4)
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(saved[name].double(), tensor.double(), rtol=1e-5, atol=1e-6), name


def tensors_in(folder: Path, step: int) -> dict[str, torch.Tensor]:
    storage = FileStorage(str(folder / "checkpoints"))
    manifest = read_manifest(storage, step, 1)
    found = {name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype]) for name, info in manifest.tensors.items()}
    load_tensors(storage, manifest, [(name, whole(tuple(t.shape)), t) for name, t in found.items()])
    return found


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_model_of_hugging_face_is_cut_as_it_is(run: Run, tmp_path: Path, name: str) -> None:
    """Its own loss, masks, positions and tied weights."""
    data = {"_target_": "hf.Samples", "name": name}
    base = {
        "model": {"_target_": "hf.from_config", "name": name},
        "data": {"train": data, "eval": data, "batch_size": 8},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
        "train": {"steps": 3, "micro_batch": 4, "eval_every": 3},
    }
    one = prepare(tmp_path / "one", base=base)
    other = piped(tmp_path / "other", "{name: ddp, pipeline: 2}", 2, base=base)
    assert run(one, 1) == [0]
    assert run(other, 2) == [0, 0]
    assert_same_curve(other, one)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_model_that_has_no_place_to_be_cut_is_refused_on_the_nodes(run: Run, tmp_path: Path) -> None:
    base = {**ROW, "model": {"_target_": "staged_models.Row", "layers": 1}}
    folder = piped(tmp_path / "run", "{name: ddp, pipeline: 3}", 3, base=base)
    assert 93 in run(folder, 3)
    message = failure(folder)["message"]
    assert "3 stages need 2 places to cut the model, and it has 1" in message
    assert message.endswith("Such places: layers.0")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_random_numbers_of_a_stage_are_its_own_and_come_again(run: Run, tmp_path: Path) -> None:
    """Dropout: other numbers in each micro-batch, block and step, the same when a block is computed again and after a
    resume; and the start says how the model was cut."""
    drawn = [tmp_path / name for name in ("drawn", "drawn-again")]
    for folder in drawn:
        folder.mkdir()
    model = {**BASE["model"], "_target_": "staged_models.noting", "dropout": 0.2, "folder": str(drawn[0])}
    train = {"steps": 6, "micro_batch": 4, "precision": "bf16", "activation_checkpointing": "full"}
    base = {**BASE, "model": model, "train": train, "checkpoint": {"every": 3, "keep": None}}
    first = piped(tmp_path / "first", "{name: ddp, pipeline: 2}", 2, base=base)
    again = piped(tmp_path / "again", "{name: ddp, pipeline: 2}", 2, f"model.folder={drawn[1]}", base=base)
    assert run(first, 2) == [0, 0]
    shutil.copytree(first / "checkpoints", again / "checkpoints")
    assert run(again, 2, attempt=2, resume=[3, 1]) == [0, 0]
    assert numbers(again) == numbers(first)[3:]
    found, repeated = (Counter(n for path in folder.iterdir() for n in path.read_text().split()) for folder in drawn)
    assert set(found.values()) == {2}, "of which the second is the computing again"
    assert len(found) == 6 * 4 * 4 * 2, "steps, micro-batches, blocks, dropouts in each"
    assert len(repeated) == len(found) / 2
    assert repeated.keys() < found.keys()
    (chosen,) = events(first, "chosen")
    words = "2 stages (1f1b), cut before blocks.2; with 4 micro-batches a rank is idle for 20% of a step"
    assert any(words in line for line in chosen["lines"])


def trace_of(model: nn.Module) -> tuple[Skeleton, Trace]:
    units = [name for name, _ in model.named_modules() if name.startswith("layers.") and name.count(".") == 1]
    skeleton = Skeleton(model, units, torch.device("cpu"))
    return skeleton, skeleton.trace(lambda each: each(torch.randn(2, 8)))


def test_what_a_cut_would_part_is_found() -> None:
    _, trace = trace_of(Skips())
    assert [trace.units[number - 1] for number in sorted(trace.cuttable)] == ["layers.2", "layers.3"]
    assert trace.parameters[0] == {"first.weight", "first.bias"}
    _, trace = trace_of(Mixed())
    assert all("gain" in names for names in trace.parameters[1:])
    assert trace.written["forwards"] == (0, False)
    assert trace.written["before.running_mean"] == (0, True)
    assert trace.written["layers.3.1.num_batches_tracked"] == (4, False)
    assert trace.costs[1] == 2 * 2 * 8 * 8
    model = Row()
    model.layers[1].register_parameter("spare", nn.Parameter(torch.ones(3)))
    _, trace = trace_of(model)
    assert trace.parameters[2] == {f"layers.1.{kind}" for kind in ("weight", "bias", "spare")}


@pytest.mark.parametrize(
    ("make", "cuttable"), [(Row, {1, 2, 3, 4}), (Fork, {3, 4}), (Direct, {2, 3, 4}), (Again, {2, 4, 5}), (Pairs, {1})]
)
def test_it_is_cut_only_where_nothing_takes_another_way(make: type[nn.Module], cuttable: set[int]) -> None:
    """Intervals: with unit number i begins interval i."""
    _, trace = trace_of(make())
    assert trace.cuttable == cuttable


def test_what_can_be_skipped_before_a_stage_does_nothing_but_compute() -> None:
    """And the look at the forward is one in the model's own mode."""
    x, modes = torch.randn(2, 8), []
    model = Mixed().eval()
    model.first.register_forward_hook(lambda module, *_: modes.append(module.training))
    skeleton, _ = trace_of(model)
    modes.clear()
    assert skeleton.shapes(lambda each: each(x), ("layers.2",), model.train()).leaves == {"first": 0}
    skeleton.shapes(lambda each: each(x), ("layers.2",), model.eval())
    assert modes == [True, False]
    vars(model.first)["forward"] = model.first.forward  # somebody's own
    skeleton, _ = trace_of(model)
    assert not skeleton.shapes(lambda each: each(x), ("layers.2",), model).leaves


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Writes, "writes computed values into a tensor that the forward has made itself"),
        (Hides, r"uses a parameter of shape \(8, 8\) that is not reached through the model"),
        (Looks, "can't be followed without values.*_local_scalar_dense can't do without"),
        (Lists, "can't be followed without values"),
        (Counts, r"layers.0 returns a number \(2\) beside its tensors"),
    ],
)
def test_what_can_not_be_followed_without_values_is_refused(model: type[nn.Module], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trace_of(model())


@pytest.mark.parametrize(
    ("make", "cuts"), [(Row, (1, 3)), (Around, (1, 3)), (Mixed, (2, 4)), (Again, (2, 4)), (Named, (1, 2, 4))]
)
def test_stage_after_stage_computes_what_the_model_computes(make: type[nn.Module], cuts: tuple[int, ...]) -> None:
    """Each on a rank of its own, in every micro-batch, of whatever size."""
    model = make()
    skeleton, trace = trace_of(model)
    assert trace.cuttable >= set(cuts)
    cut = make_cut(model, trace, cuts)
    ranks = [StagedModel(copy.deepcopy(model), cut, [stage], torch.device("cpu")) for stage in range(cut.num_stages)]

    def check(x: torch.Tensor) -> None:
        wanted = copy.deepcopy(model)(x)
        shapes = skeleton.shapes(lambda each: each(x), cut.firsts, model)
        for _ in range(2):
            found: Any = []
            for stage, rank in enumerate(ranks):
                found = rank.run(stage, found, shapes, lambda each: each(x))
            assert torch.equal(found, wanted)

    for size in (2, 3):
        check(torch.randn(size, 8))


def test_a_forward_that_goes_otherwise_than_the_batchs_shapes_let_expect_is_refused() -> None:
    model, x = Row(), torch.randn(2, 8)
    skeleton, trace = trace_of(model)
    cut = make_cut(model, trace, (3,))
    shapes = skeleton.shapes(lambda each: each(x), cut.firsts, model)
    stages = [StagedModel(copy.deepcopy(model), cut, [stage], torch.device("cpu")) for stage in range(2)]
    cases: list[tuple[int, Any, str]] = [
        (0, lambda each: x, "did not come to layers.2, where stage 1 begins"),
        (0, lambda each: each(torch.cat([x, x])), r"gets a tensor of torch.float32 \(4, 8\)"),
        (0, lambda each: each.layers[2](None), "what layers.2 is called with depends on something"),
        (1, lambda each: each.layers[0](x), "what the model returns depends on something"),
        (1, lambda each: SimpleNamespace(hidden=each.layers[0](x)), "what the model returns depends on something"),
    ]
    for stage, forward, words in cases:
        with pytest.raises(UsageError, match=words):
            stages[stage].run(stage, [torch.randn(2, 8)] * stage, shapes, forward)


def test_what_a_rank_could_not_keep_up_to_date_is_absent() -> None:
    """Buffers that only their own stage can write; one parameter stays one."""
    model = Mixed()
    block = model.layers[1]
    assert isinstance(block, nn.Sequential)
    block[0].weight = model.layers[0].get_parameter("0.weight")
    _, trace = trace_of(model)
    cut = make_cut(model, trace, (3,))
    assert cut.buffers == {name: int(name > "layers.2") for name, _ in model.named_buffers()}
    StagedModel(model, cut, [1], torch.device("cpu"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert {name for name, buffer in model.named_buffers() if is_absent(buffer)} == {
        "before.running_mean",
        "before.running_var",
        *(f"layers.{number}.1.{kind}" for number in (0, 1) for kind in statistics),
    }
    assert is_absent(block[0].weight)
    assert block[0].weight is model.layers[0].get_parameter("0.weight")


def test_a_rank_keeps_the_values_of_its_stages_only() -> None:
    model = Row()
    skeleton, trace = trace_of(model)
    staged = StagedModel(model, make_cut(model, trace, (3,)), [1], torch.device("cpu"))
    assert {name for name, parameter in model.named_parameters() if not is_absent(parameter)} == {
        f"layers.{number}.{kind}" for number in (2, 3) for kind in ("weight", "bias")
    }
    x = torch.randn(2, 8)
    shapes = skeleton.shapes(lambda each: each(x), ("layers.2",), model)
    given = torch.randn(2, 8)
    found = staged.run(1, [given], shapes, lambda each: each(x))
    wanted = torch.tanh(model.layers[3](torch.tanh(model.layers[2](given))))
    assert torch.equal(found, wanted)
    called = model.layers[2](x)
    assert torch.equal(called, nn.functional.linear(x, *model.layers[2].parameters())), "outside of a stage, by hand"


def test_what_lies_before_a_stage_is_computed_only_where_somebody_may_see_it() -> None:
    model = Around()
    x, given = torch.randn(2, 8), torch.randn(2, 8, requires_grad=True)
    wanted = model.twice(model.layers[3](model.layers[2](given.clone()) + 1) + 1) * torch.softmax(x, dim=-1)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), given)
    skeleton, trace = trace_of(model)
    cut = make_cut(model, trace, (3,))
    shapes = skeleton.shapes(lambda each: each(x), ("layers.2",), model)
    assert shapes.leaves == {"first": 0}

    def check() -> None:
        staged = StagedModel(model, cut, [1], torch.device("cpu"))
        found = staged.run(1, [given], shapes, lambda each: each(x))
        assert torch.equal(found, wanted)
        assert torch.equal(torch.autograd.grad(found.sum(), given)[0], wanted_gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.first, "forward", None)
        check()
    assert model.second.calls == 1
    seen: list[nn.Module] = []
    model.first.register_forward_hook(lambda module, *_: seen.append(module))
    check()
    assert seen == [model.first]
    assert model.second.calls == 2


@pytest.mark.parametrize("make", [Skips, Pairs])
def test_a_value_that_takes_another_way_is_refused_and_never_made_up(make: type[nn.Module]) -> None:
    """The trace would not cut here; a forward that takes another branch later may all the same."""
    model = make()
    skeleton, trace = trace_of(model)
    staged = StagedModel(model, make_cut(model, trace, (2,)), [1], torch.device("cpu"))
    x = torch.randn(2, 8)
    shapes = skeleton.shapes(lambda each: each(x), ("layers.1",), model)
    with pytest.raises(UsageError, match="depends on something that was computed in an earlier stage"):
        staged.run(1, [torch.randn(2, 8)], shapes, lambda each: each(x))


def test_random_numbers_before_a_stage_are_alike_on_all_ranks_and_in_it_its_own() -> None:
    model, x, given = Drops(), torch.randn(2, 8), torch.randn(2, 8)
    skeleton, trace = trace_of(model)
    shapes = skeleton.shapes(lambda each: each(x), ("layers.3",), model)
    torch.manual_seed(7)
    kept = nn.functional.dropout(x)
    torch.manual_seed(8)
    wanted = nn.functional.dropout(model.layers[3](given)) * kept
    staged = StagedModel(model, make_cut(model, trace, (4,)), [1], torch.device("cpu"))
    assert torch.equal(staged.run(1, [given], shapes, lambda each: each(x), seeds=(7, 8)), wanted)


def test_absent_values_can_not_be_looked_at_or_stored() -> None:
    absent = absent_like(torch.randn(2, 3))
    assert is_absent(absent + torch.ones(3))
    assert not is_absent(torch.zeros_like(absent))
    for look in (lambda: float(absent.sum()), lambda: bool((absent > 0).all())):
        with pytest.raises(NeedsValues):
            look()
    with pytest.raises(NeedsValues, match="into a tensor that is"):
        torch.zeros(2, 3).add_(absent)


def test_what_is_made_in_the_likeness_of_an_absent_tensor_has_its_values() -> None:
    real = torch.randn(2, 3)
    absent = absent_like(real)
    for make in (
        lambda like: torch.zeros_like(like),
        lambda like: torch.ones_like(like),
        lambda like: torch.full_like(like, 2.5),
        lambda like: like.new_zeros(4),
        lambda like: like.new_ones(4),
        lambda like: like.new_full((4,), 2.5),
    ):
        assert torch.equal(make(absent), make(real))


def test_what_is_computed_from_absent_tensors_has_the_form_that_it_would_have() -> None:
    """Whatever was computed before: what is known of an operation holds for the same kinds of arguments only."""
    number, count = torch.randn(3, 3), torch.ones(3, 3, dtype=torch.int64)
    for one in (number, number.t(), count, number.double(), number[:2]):
        for other in (2, 2.0, True, one):
            for dtype in (torch.float32, torch.float64):
                torch.set_default_dtype(dtype)
                found, wanted = ((each * other, each / 3) for each in (absent_like(one), one))
                torch.set_default_dtype(torch.float32)
                assert all(map(is_absent, found))
                forms = [[(each.shape, each.stride(), each.dtype) for each in both] for both in (found, wanted)]
                assert forms[0] == forms[1], (one, other, dtype)


def test_an_absent_value_takes_another_shape_alone() -> None:
    """What is known of its kind is kept for the next ones."""
    absent = absent_like(torch.randn(2, 3))
    for _ in range(2):
        total = absent + torch.ones(3)
        assert total.shape == (2, 3)
        assert (total.t_() + torch.ones(2)).shape == (3, 2)
    assert (absent + torch.ones(3)).shape == (2, 3)


def test_stages_are_balanced() -> None:
    assert balance([0, 1, 1, 1, 1], [1, 2, 3, 4], 2) == (3,)
    assert balance([0, 1, 1, 1, 3], [2, 3, 4], 2) == (4,)  # the head costs as much as three blocks
    assert balance([5, 1, 1, 1, 1], [2, 3, 4], 3) == (2, 4) or balance([5, 1, 1, 1, 1], [2, 3, 4], 3) == (2, 3)
    assert balance([0, 0, 0, 0], [1, 2, 3], 2) == (2,)  # nothing is known: by number
    assert balance([1, 1, 1], [2], 3) is None
    assert imbalance([0, 1, 1, 1, 3], (4,)) == 1.0


def test_what_a_schedule_asks_of_the_micro_batches() -> None:
    assert refused_micro_batches("gpipe", 4, 1) == ""
    assert refused_micro_batches("1f1b", 4, 4) == ""
    assert "needs 4 micro-batches or more" in refused_micro_batches("1f1b", 4, 3)
    assert refused_micro_batches("interleaved", 4, 10) == ""
    assert "2 equal rounds" in refused_micro_batches("interleaved", 4, 9)


def test_specs_are_told_and_heard() -> None:
    specs = [
        TensorSpec(name="a", dtype="F32", shape=(4, 2), layout=Layout((2, 1), ((0, 2), (1, 3)))),
        TensorSpec(name="b", dtype="I64", shape=(), layout=Layout((), ((0,),))),
        TensorSpec(name="c", dtype="F32", shape=(3,), layout=Patches(((Box((0,), (3,)), (1,)),))),
    ]
    assert decode(json.loads(json.dumps(encode(specs)))) == specs


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy={name: ddp, pipeline: 3}"], "ddp pipeline 3 x replicate auto"),
        (["strategy={name: single, pipeline: 2}"], "pipeline 2 does not go with single"),
        (["strategy={name: ddp, pipeline: 2}", "train.micro_batch=null"], "Set 7 or fewer, or take pipeline_schedule"),
        (["strategy={name: ddp, pipeline: 2, pipeline_split: [a, b]}"], "so 1; found 2"),
        (["strategy={name: ddp, pipeline: 2, pipeline_stages: 2}"], "1f1b has one stage a rank"),
        (["strategy={name: ddp, pipeline_split: [a]}"], "belongs to a pipeline, and strategy.pipeline is 1"),
        (["strategy={name: ddp, pipeline: 2}", "on_end=parity.mean_loss"], "on_end: gets the model to call"),
        (["strategy={name: ddp, pipeline: 2}", "data.forward=parity.mean_loss"], "data.forward: does not go with"),
    ],
)
def test_what_can_not_be_is_said_before_anything_starts(tmp_path: Path, overrides: list[str], words: str) -> None:
    config = tmp_path / "cfg.yaml"
    config.write_text(json.dumps({**BASE, "cluster": {"procs_per_node": 4}}))
    size = "cluster.procs_per_node=" + ("2" if "micro_batch" in "".join(overrides) else "4")
    with pytest.raises(UsageError, match=words):
        load_config(config, [size, *overrides], run_dir=str(tmp_path / "run"), name="case")
