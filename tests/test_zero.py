"""zero1, zero2 and zero3 on DeepSpeed itself: the losses of one process, the same bits after a resume, half precision,
offload, models that are hard on it, and a DeepSpeed that is not the one that is known. Checkpoints to and from all
other layouts: test_any_layout.py; Hugging Face's models: test_huggingface.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from cases import Ask, Run, events, losses, needs, numbers, prepare, rank_functions, rank_runner, worst_difference
from odd_models import Aging
from parity import TOLERANCE

from dtrain.cluster.errors import ConfigError, UsageError
from dtrain.launcher.compose import load_config
from dtrain.strategies.config import StrategyConfig, StrategyName
from dtrain.strategies.layout import check_layout
from dtrain.strategies.protocol import ModelSpec, Topology
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.zero_gradients import SameModules
from dtrain.strategies.zero_joined import JoinedStep
from dtrain.strategies.zero_partitions import Slice

needs("deepspeed", "needs DeepSpeed: pip install --no-build-isolation 'dtrain[deepspeed]'", module=True)

ON_CPU = {"DS_ACCELERATOR": "cpu"}
KEPT = ["checkpoint.every=40", "checkpoint.keep=null"]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner(ON_CPU, preload=["deepspeed"])


@pytest.fixture(scope="module")
def ask() -> Ask:
    return rank_functions(ON_CPU, preload=["deepspeed"])


def ranks(strategy: str, number: int) -> list[str]:
    """Overrides; the number is what the check of the layout counts, the ranks are the test's."""
    return [f"strategy={strategy}", f"cluster.procs_per_node={number}"]


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """One process's run of some overrides, once each."""
    known: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in known:
            folder = prepare(tmp_path_factory.mktemp("one") / "run", "strategy=single", *overrides)
            assert run(folder, 1) == [0]
            known[overrides] = folder
        return known[overrides]

    return make


# ---- one process's curve, and the same bits after a resume ----


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "size"), [("zero1", 2), ("zero2", 3), ("zero3", 2), ("zero3", 4)])
def test_it_learns_what_one_process_learns_and_resumes_to_the_same_bits(
    run: Run, one: Callable[..., Path], tmp_path: Path, strategy: str, size: int
) -> None:
    """With a tied weight, two groups, clipping, and micro-batches of uneven sizes. At two ranks any order of a sum is
    the same: their resumes are test_relaunch.py's."""
    whole = prepare(tmp_path / "whole", *ranks(strategy, size), *KEPT)
    assert run(whole, size) == [0] * size
    assert worst_difference(losses(whole), losses(one())) <= TOLERANCE["fp32"]
    if size == 2:
        return
    half = prepare(tmp_path / "half", *ranks(strategy, size), f"checkpoint.url={whole / 'checkpoints'}")
    assert run(half, size, attempt=2, resume=[40, 1]) == [0] * size
    assert events(half, "resumed")[0]["strategy"] == strategy
    assert numbers(half) == numbers(whole)[40:]


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["{name: zero1, offload: cpu}", "{name: zero3, offload: cpu}"])
def test_offload_changes_no_number_that_matters(
    run: Run, one: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    folder = prepare(tmp_path / "run", *ranks(strategy, 2), "train.steps=12")
    assert run(folder, 2) == [0, 0]
    assert worst_difference(losses(folder), losses(one("train.steps=12"))) <= TOLERANCE["fp32"]


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "precision"), [("zero3", "bf16"), ("zero2", "fp16")])
def test_half_precision_is_as_near_as_its_rounding(
    run: Run, one: Callable[..., Path], tmp_path: Path, strategy: str, precision: str
) -> None:
    more = ["train.steps=12", f"train.precision={precision}"]
    folder = prepare(tmp_path / "run", *ranks(strategy, 2), *more)
    assert run(folder, 2) == [0, 0]
    assert worst_difference(losses(folder), losses(one(*more))) <= TOLERANCE[precision]
    assert losses(folder) != losses(one("train.steps=12")), "it did compute in another precision"


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["{name: zero1, offload: cpu}", "zero2", "zero3"])
def test_a_step_whose_gradients_overflow_leaves_nothing_behind(
    run: Run, one: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    """fp16: the first ones are skipped, in the same steps as in one process."""
    more = ["train.precision=fp16", "loss=parity.steep_loss", "train.steps=16"]
    folder = prepare(tmp_path / "run", *ranks(strategy, 2), *more)
    assert run(folder, 2) == [0, 0]
    found, wanted = numbers(folder), numbers(one(*more))
    assert [record[3:] for record in found] == [record[3:] for record in wanted]
    assert {record[3] for record in found} == {True, None}
    assert losses(folder) == pytest.approx(losses(one(*more)), rel=TOLERANCE["fp16"])


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_evaluations_and_checkpointed_activations_under_zero3(
    run: Run, one: Callable[..., Path], tmp_path: Path
) -> None:
    """Forwards without a backward between the steps, and forwards that are computed again."""
    more = ["train.steps=9", "train.eval_every=4", "data.eval._target_=parity.Tokens", "data.eval.samples=21"]
    folder = prepare(tmp_path / "run", *ranks("zero3", 2), *more, "train.activation_checkpointing=full")
    assert run(folder, 2) == [0, 0]
    assert losses(folder) == pytest.approx(losses(one(*more)), rel=1e-6)


# ---- models that are hard on it ----

MODELS = ["tied_across", "reused", "frozen", "sequential", "Branches"]
REFUSED = {"Scalar": ["scale", "(1,)"], "ChannelsLast": ["conv.weight", "strides"], "two_dtypes": ["is float64"]}


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def alone(ask: Ask) -> dict[str, Any]:
    """What one process learns, by model."""
    (found,) = ask("odd_models.learn_each", 1, models=MODELS, strategy="single")
    return dict(found)


@pytest.mark.e2e
@pytest.mark.parametrize(("strategy", "size", "parts"), [("zero1", 3, 2), ("zero2", 3, 2), ("zero3", 2, 1)])
def test_odd_models_learn_what_one_process_learns(
    ask: Ask, alone: dict[str, Any], strategy: str, size: int, parts: int
) -> None:
    """With momentum and weight decay: a gradient of zeros and no gradient at all are not the same. Branches: ranks use
    different parameters, and some parameters no rank uses."""
    for rank in ask("odd_models.learn_each", size, models=MODELS, strategy=strategy, parts=parts):
        for model, found in rank.items():
            wanted = alone[model]
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5), model
            assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5), model
            for name, values in wanted["parameters"].items():
                assert flat(found["parameters"][name]) == pytest.approx(flat(values), abs=1e-6), (model, name)


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_optimizers_state_resumes_to_the_same_bits(ask: Ask, tmp_path: Path, strategy: str) -> None:
    """Adagrad makes its state at construction, on the whole parameters; Aging's are plain numbers."""
    cases = [
        {"model": "frozen", "strategy": strategy, "folder": str(tmp_path / name), "optimizer": {"name": name}}
        for name in ("Adagrad", "Aging")
    ]
    whole = ask("odd_models.resume_each", 2, save=True, cases=cases)
    assert all(case[0][0] > 0 for case in whole[0])
    assert ask("odd_models.resume_each", 2, save=False, cases=cases) == whole


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_what_an_optimizer_has_made_at_its_construction_is_kept(ask: Ask, strategy: str) -> None:
    optimizer = {"name": "Adagrad", "initial_accumulator_value": 0.5}
    (alone,) = ask("odd_models.learn", 1, model="frozen", strategy="single", optimizer=optimizer)
    for found in ask("odd_models.learn", 2, model="frozen", strategy=strategy, optimizer=optimizer):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def in_one_partition(make: Callable[..., torch.optim.Optimizer]) -> tuple[torch.optim.Optimizer, JoinedStep]:
    """Three parameters of 5, 0 and 3 elements, with padding behind each, and their own optimizer."""
    flat, ranges = torch.linspace(-1, 1, 12), [(0, 5), (6, 6), (7, 10)]
    flat.grad = torch.zeros(12)
    slices = [
        Slice(
            name=f"p{begin}",
            shape=(end - begin,),
            parameter=torch.nn.Parameter(torch.zeros(end - begin)),
            ranges=((0, end - begin),),
            rank=0,
            mine=torch.nn.Parameter(flat.narrow(0, begin, end - begin)),
            flat=flat,
            offset=begin,
        )
        for begin, end in ranges
    ]
    optimizer = make([{"params": [torch.zeros(2, requires_grad=True)]}, {"params": [one.mine for one in slices]}])
    return optimizer, JoinedStep(optimizer, flat, slices)


def seen_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Values and states, by parameter."""
    parameters = optimizer.param_groups[1]["params"]
    return [(p.tolist(), {k: torch.as_tensor(v).tolist() for k, v in optimizer.state[p].items()}) for p in parameters]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adagrad, lr=0.1),
        partial(Aging, lr=0.1),
    ],
)
def test_one_step_of_a_partition_is_the_step_of_each_parameter(make: partial[torch.optim.Optimizer]) -> None:
    """Bit for bit, states too: when nothing is left out, when a parameter is, ever after, and after loading."""
    (one, joined), (each, single) = in_one_partition(make), in_one_partition(make)
    for step in range(8):
        for optimizer, steps, whole in ((one, joined, True), (each, single, False)):
            if step == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            left_out = steps._slices[2].parameter
            unused = {left_out} if step in (4, 5) else set()
            flat = steps._slices[0].flat
            assert flat is not None
            assert flat.grad is not None
            for part in steps._slices:
                part.gradient.copy_(torch.sin(torch.arange(part.mine.numel()) + step + 1.0))
            if whole:
                steps.step(flat.grad, unused)
                assert (steps._seen is optimizer.state) == (step < 4 or (step > 5 and make.func is torch.optim.SGD))
            else:
                steps._step_each(unused)
        assert seen_of(one) == seen_of(each), step


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_what_an_update_takes_for_a_moment_is_in_the_prediction(ask: Ask, strategy: str) -> None:
    """In parts of the parameters, as a model's size does not matter: what torch allocates in an update, but for the
    partition's gradient in one piece, which counts to the gradients. Predicted for a model whose partition is larger
    than a bucket."""
    size, num_ranks = 8 << 30, 2
    model = ModelSpec(num_parameters=size // 4, parameter_bytes=size, largest_unit_bytes=1 << 20)
    topology = Topology(global_rank=0, world_size=num_ranks, nodes=1, device_type="cpu")
    config = StrategyConfig(name=cast(StrategyName, strategy))
    predicted = get_strategy(strategy).predict(model, config, topology).transient
    for whole, taken in ask("zero_functions.update_bytes", num_ranks, strategy=strategy):
        assert predicted / size == pytest.approx(taken / whole - 1 / num_ranks, rel=0.01)


def test_ranks_that_run_other_modules_are_noticed() -> None:
    first, second = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)) for _ in "ab")
    ranks = [SameModules(first), SameModules(second)]

    def compare() -> None:
        sums = [sum(numbers) for numbers in zip(*(rank.take() for rank in ranks), strict=True)]
        for rank in ranks:
            rank.compare(sums)

    for model in (first, second):
        model(torch.ones(1, 2))
    compare()
    first[0](torch.ones(1, 2))
    second[2](torch.ones(1, 2))
    with pytest.raises(UsageError, match="different ways through the model"):
        compare()
    compare()  # each time for itself
    for model, order in ((first, (0, 2)), (second, (2, 0))):
        for number in order:
            model[number](torch.ones(1, 2))
    with pytest.raises(UsageError, match="different ways through the model"):
        compare()


# ---- another DeepSpeed ----


@pytest.mark.e2e
@pytest.mark.parametrize(("strategy", "size"), [("zero2", 2), ("zero3", 3)])
def test_the_self_check_leaves_the_initial_weights_and_finds_what_has_moved(ask: Ask, strategy: str, size: int) -> None:
    assert ask("zero_functions.start", size, strategy=strategy) == [True] * size
    for found in ask("zero_functions.start", size, strategy=strategy, break_it="moved"):
        assert found["error"] == "UsageError"
        assert "embed.weight does not lie where it is looked for" in found["message"]
    for found in ask("zero_functions.start", size, strategy=strategy, break_it="gone"):
        assert found["error"] == "UsageError"
        assert "its partitions are not where they are looked for" in found["message"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        (StrategyConfig(name="fsdp", offload="cpu"), "strategy.offload", ["does not go with fsdp", "zero3"]),
        (StrategyConfig(name="zero3", replicate=2), "strategy.replicate", ["does not go with zero3", "fsdp"]),
        (StrategyConfig(name="zero2", tensor=2), "strategy.tensor", ["does not go with zero2", "fsdp"]),
        (StrategyConfig(name="zero1", shard=2), "strategy.shard", ["zero1 shard 2 = 2 ranks, but 1 node x 4 = 4"]),
    ],
)
def test_what_does_not_go_with_it_is_said_before_anything_starts(
    config: StrategyConfig, key: str, words: list[str]
) -> None:
    ((found, message),) = check_layout(config, 1, 4)
    assert found == key
    assert all(word in message for word in words)


def test_the_refusal_says_where_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(
        "model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}\nstrategy: {name: ddp, offload: cpu}\n"
    )
    with pytest.raises(ConfigError, match=r"cfg\.yaml:2.*offload cpu does not go with ddp"):
        load_config(path, [])


@pytest.mark.e2e
def test_parameters_that_deepspeed_fails_at_are_refused_in_words(ask: Ask) -> None:
    for rank in ask("odd_models.learn_each", 2, models=list(REFUSED), strategy="zero3"):
        for model, found in rank.items():
            assert found["error"] == "UsageError"
            assert all(word in found["message"] for word in REFUSED[model])


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_an_optimizer_of_ones_own_that_pieces_would_change_is_refused(ask: Ask, strategy: str) -> None:
    for found in ask("zero_functions.start", 2, strategy=strategy, optimizer="Trusting"):
        assert found["error"] == "UsageError"
        assert "zero_functions.Trusting is not elementwise" in found["message"]
