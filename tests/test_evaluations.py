"""Evaluations: exact means of the user's metrics, what they may return, and when they end a run early."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dtrain.cluster.errors import UsageError
from dtrain.runtime import earlystop
from dtrain.runtime.config import EarlyStopConfig, TrainConfig
from dtrain.runtime.data import MapSource, PassPlan, count_samples
from dtrain.runtime.earlystop import History
from dtrain.runtime.evaluate import Evaluation
from dtrain.runtime.evaluations import Evaluations, is_due
from dtrain.runtime.means import Means, sums_of
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.report import Reporter
from dtrain.runtime.task import Task, forward
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.passes import OneByOne

# ---- what metrics may return ----


def test_numbers_weigh_by_the_batch_and_pairs_by_themselves() -> None:
    found = {"plain": 0.5, "tensor": torch.tensor([0.25]), "numpy": np.float32(2), "bool": True, "pair": (3, 4)}
    expected = {"plain": (4.0, 8.0), "tensor": (2.0, 8.0), "numpy": (16.0, 8.0), "bool": (8.0, 8.0), "pair": (3.0, 4.0)}
    assert sums_of(found, 8.0) == expected


def test_a_mean_over_nothing_says_nothing() -> None:
    means = Means()
    means.add(sums_of({"a": math.nan, "b": (math.nan, 0)}, 0.0), counts=True)
    means.add(sums_of({"a": 3.0, "b": (6.0, 3)}, 2.0), counts=True)
    means.add(sums_of({"a": 9.0, "b": (9.0, 1)}, 5.0), counts=False)  # a micro-batch that only joins in
    assert means.reduce(lambda values: values) == {"a": (6.0, 2.0), "b": (6.0, 3.0)}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (0.5, "returned a float. Return a dict"),
        ({"accuracy": torch.ones(2)}, r"accuracy is a Tensor of shape \(2,\)"),
        ({"accuracy": "high"}, "accuracy is a str"),
        ({"accuracy": None}, "accuracy is a NoneType"),
        ({"accuracy": (1.0, 2.0, 3.0)}, "accuracy is a tuple"),
        ({"accuracy": (torch.ones(3), 3)}, "accuracy is a Tensor"),
        ({"loss": 1.0}, "the mean loss is reported by itself"),
        ({"step": 1.0}, "the records use it"),
        ({1: 1.0}, "returned the name 1"),
    ],
)
def test_anything_else_is_refused_with_its_name(found: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sums_of(found, 2.0)


def test_other_names_than_before_are_refused() -> None:
    means = Means()
    means.add({"a": (1.0, 1.0)}, counts=True)
    with pytest.raises(UsageError, match="found a, b, but on the batches before a"):
        means.add({"a": (1.0, 1.0), "b": (1.0, 1.0)}, counts=True)


def across(*ranks: dict[str, tuple[float, float]]) -> list[Any]:
    """What reduce() gives on each rank, their sums met by threads."""
    import threading

    barrier, parts = threading.Barrier(len(ranks), timeout=10), [[0.0]] * len(ranks)

    def all_reduce(rank: int) -> Callable[[list[float]], list[float]]:
        def reduce(values: list[float]) -> list[float]:
            parts[rank] = values
            barrier.wait()
            total = [sum(column) for column in zip(*parts, strict=True)]
            barrier.wait()
            return total

        return reduce

    results: list[Any] = [None] * len(ranks)

    def run(rank: int) -> None:
        means = Means()
        means.add(ranks[rank], counts=True)
        try:
            results[rank] = means.reduce(all_reduce(rank))
        except UsageError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_means_over_ranks() -> None:
    """In another order on the second rank; a plain mean of means would be 3."""
    found = across({"loss": (4.0, 2.0), "a": (1.0, 1.0)}, {"a": (3.0, 1.0), "loss": (4.0, 1.0)})
    assert found == [{"loss": (8.0, 3.0), "a": (4.0, 2.0)}] * 2
    assert list(found[0]) == ["loss", "a"]


def test_ranks_with_other_names_fail_together() -> None:
    for found in across({"a": (1.0, 1.0)}, {"a": (1.0, 1.0)}, {"b": (1.0, 1.0), "c": (1.0, 1.0)}):
        assert "the ranks found different names" in found


# ---- an evaluation ----


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index)), torch.tensor(index % 2)


class Moody(nn.Module):
    """Gives a tensor in eval mode and a pair in training, as some vision models do; one part stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.part = nn.Dropout(0.5)
        self.part.eval()

    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.training else x * self.weight * self.part(torch.ones(()))


def own_metrics(output: Tensor, batch: Any) -> dict[str, Any]:
    odd = batch[1] == 1
    return {"mean": output.mean(), "odd": (output[odd].sum(), odd.sum()), "noise": torch.rand(())}


@pytest.fixture
def alone() -> Ranks:
    ranks = Ranks.__new__(Ranks)
    ranks.global_rank, ranks.world_size, ranks.device = 0, 1, torch.device("cpu")
    return ranks


def evaluation(
    ranks: Ranks, metrics: Any, loss: Any = lambda output, batch, count: (output.sum(), count)
) -> Evaluation:
    plan = PassPlan(7, batch_size=4, rank=0, world_size=1, micro_batch=3)
    return Evaluation(
        make_source=lambda: MapSource(Numbers(), plan, seed=0, num_steps=plan.num_steps, key="data.eval"),
        ranks=ranks,
        data=Degrees().data_rank(0),
        passes=OneByOne(),
        seed=0,
        workers=0,
        collate=None,
        task=Task(forward=forward, loss=loss, count=count_samples),
        metrics=metrics,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        stop_requested=lambda: False,
    )


def test_metrics_are_exact_and_every_part_keeps_its_mode(alone: Ranks) -> None:
    model = Moody().train()
    model.part.eval()
    found = evaluation(alone, own_metrics)(model)
    assert found is not None
    assert (found["loss"], found["mean"], found["odd"]) == (6.0, 6.0, 6.0)
    assert model.training
    assert not model.part.training
    random.seed(1)
    torch.manual_seed(1)
    assert evaluation(alone, own_metrics)(model) == found  # a repeated one draws the same numbers


@pytest.mark.parametrize("error", [ValueError("planted"), UsageError("metrics: planted")])
def test_an_error_names_the_batch_and_the_mode(alone: Ranks, error: Exception) -> None:
    def fails(output: Tensor, batch: Any) -> dict[str, float]:
        if batch[0][0] == 4:
            raise error
        return {}

    model = Moody()
    with pytest.raises(type(error)) as raised:
        evaluation(alone, fails)(model)
    told = [str(raised.value), *getattr(raised.value, "__notes__", ())]
    assert "on batch 2 of data.eval (samples [4, 5, 6]), the model in eval mode" in " ".join(told)
    assert model.training


def test_metrics_without_a_mean_are_nan(alone: Ranks) -> None:
    found = evaluation(alone, lambda output, batch: {"none": (0, 0)})(Moody())
    assert found is not None
    assert math.isnan(found["none"])
    with pytest.raises(UsageError, match="counts add up to 0"):
        evaluation(alone, None, loss=lambda output, batch, count: (output.sum(), 0.0))(Moody())


# ---- early stop ----

RULE = EarlyStopConfig(metric="loss", mode="min", patience=2, min_delta=0.1)


def history(values: list[float], rule: EarlyStopConfig = RULE, saved: dict[str, Any] | None = None) -> History:
    found = earlystop.begin(rule, saved)
    for number, value in enumerate(values, start=1):
        found = earlystop.advance(found, found.seen + 10 if saved else number * 10, value, rule.min_delta)
    return found


def test_patience_counts_evaluations_without_enough_gain() -> None:
    assert earlystop.verdict(history([5.0, 4.0, 3.95]), RULE) == ""
    found = history([5.0, 4.0, 3.95, 3.92])
    assert earlystop.verdict(found, RULE) == (
        "stopped early at step 40: loss did not improve for 2 evaluations (best 4 at step 20)"
    )
    assert history([5.0, 4.0, 3.95, 3.9]).waited == 0  # a gain of just min_delta
    assert history([4.0, 4.0, 4.0], EarlyStopConfig(patience=2)).waited == 2  # an equal one is no improvement


def test_more_can_be_better_and_nan_never_is() -> None:
    rule = EarlyStopConfig(metric="accuracy", mode="max", patience=2)
    assert history([0.5, 0.6, math.nan, math.inf], rule).best == 0.6
    assert "(best 0.6 at step 20)" in earlystop.verdict(history([0.5, 0.6, math.nan, math.inf], rule), rule)
    assert "it was never finite" in earlystop.verdict(history([math.nan, math.nan], rule), rule)


def test_a_history_goes_on_where_it_was_saved() -> None:
    saved = json.loads(json.dumps(history([5.0, 4.0, 3.95]).to_json()))
    assert history([3.94], saved=saved) == history([5.0, 4.0, 3.95, 3.94])
    again = earlystop.advance(earlystop.begin(RULE, saved), 30, 3.95, RULE.min_delta)
    assert again == history([5.0, 4.0, 3.95])  # the evaluation of step 30, repeated, is not counted twice
    other = EarlyStopConfig(metric="accuracy", mode="max")
    assert earlystop.begin(other, saved).best is None


def evaluations(values: list[float], log: Path, **more: Any) -> Evaluations:
    left = iter(values)
    return Evaluations(
        lambda model: {"loss": next(left), "accuracy": 0.5},
        TrainConfig(steps=100, eval_every=10, early_stop=RULE),
        wanted=more.get("wanted", {}),
        attempt=1,
        report=Reporter(-1),
        log=MetricsLog(log, 0),
        history=more.get("history"),
    )


def test_evaluations_are_recorded_and_end_the_run(tmp_path: Path) -> None:
    found = evaluations([5.0, math.nan, 5.0], tmp_path / "e.jsonl")
    for step in (10, 20):
        found.run(step, nn.Identity())
        assert found.verdict == ""
    found.run(30, nn.Identity())
    assert found.verdict.startswith("stopped early at step 30: loss did not improve for 2")
    records = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert records[0] == {"step": 10, "attempt": 1, "loss": 5.0, "accuracy": 0.5}
    assert records[1] == {"step": 20, "attempt": 1, "loss": None, "accuracy": 0.5, "nonfinite": {"loss": "nan"}}
    resumed = evaluations([5.0], tmp_path / "f.jsonl", history=found.state()["early_stop"])
    resumed.run(30, nn.Identity())
    assert resumed.verdict == found.verdict


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = evaluations([5.0], tmp_path / "e.jsonl", wanted={"train.early_stop.metric": "acuracy"})
    with pytest.raises(
        UsageError, match=r"train.early_stop.metric: there is no metric acuracy. The evaluation gives: loss, accuracy"
    ):
        found.run(10, nn.Identity())


def test_when_an_evaluation_is_due() -> None:
    every = TrainConfig(steps=25, eval_every=10)
    assert [step for step in range(1, 30) if is_due(every, step)] == [10, 20, 25, 26, 27, 28, 29]
    assert [step for step in range(1, 26) if is_due(TrainConfig(steps=25), step)] == [25]
