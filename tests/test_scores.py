"""Which checkpoints are the best, by evaluations that lie beside them, and what that keeps from being deleted."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.cluster.errors import CheckpointError
from dtrain.cluster.filestore import FileStorage
from dtrain.launcher.commands import ckpt
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.garbage import find_garbage
from dtrain.runtime.checkpoint.loader import load_model
from dtrain.runtime.checkpoint.scores import BestRule, Score, Scores, best_of, put_score, read_score
from dtrain.strategies.boxes import TensorSpec, replicated, whole

SPECS = [TensorSpec(name="model.weight", dtype="F32", shape=(1, 1), layout=replicated(2, 1))]
LOW = BestRule(metric="loss", mode="min", keep=1)


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    store = FileStorage(str(tmp_path / "store"))
    claim_attempt(store, host="h", job_id="j")
    return store


def checkpointer(store: FileStorage, keep: int | None, best: BestRule | None, attempt: int = 1) -> Checkpointer:
    return Checkpointer(
        store, attempt=attempt, rank=0, world_size=1, strategy={"name": "ddp"}, board=LocalBoard(),
        on_commit=lambda done: None, keep=keep, best=best,
    )  # fmt: skip


def run(
    store: FileStorage, values: dict[int, float | None], *, keep: int | None = 1, best: BestRule | None = LOW
) -> None:
    """Saves the steps and rates those that have a value, as a run does."""
    saves = checkpointer(store, keep, best)
    for step, value in values.items():
        saves.save(step, SPECS, {"model.weight": [(whole((1, 1)), torch.full((1, 1), float(step)))]}, {})
        if value is not None:
            saves.rate(step, 1, {"loss": value, "accuracy": -value})
    saves.wait()


def steps(store: FileStorage) -> list[int]:
    return [info.step for info in live_checkpoints(store)]


def test_the_best_stay_besides_the_newest(store: FileStorage) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: None})
    assert steps(store) == [2, 5]
    assert not (store.root / names.step_dir(1, 1)).exists()


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        (None, [5]),
        (BestRule(metric="loss", mode="max", keep=1), [1, 5]),
        (BestRule(metric="accuracy", mode="max", keep=2), [2, 3, 5]),
        (BestRule(metric="nothing", mode="max", keep=2), [5]),
    ],
)
def test_by_any_rule(store: FileStorage, best: BestRule | None, kept: list[int]) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: None}, best=best)
    assert steps(store) == kept


def test_the_last_evaluation_counts_too(store: FileStorage) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 2.0})
    assert steps(store) == [3]


def test_what_is_not_finite_is_never_the_best(store: FileStorage) -> None:
    run(store, {1: math.nan, 2: -math.inf, 3: 7.0, 4: math.nan}, best=BestRule(keep=3))
    assert steps(store) == [3, 4]
    score = read_score(store, names.step_dir(4, 1))
    assert score is not None
    assert score.metrics == {"loss": None, "accuracy": None}


def test_a_dead_checkpoint_is_not_the_best(store: FileStorage) -> None:
    run(store, {1: 5.0, 2: 1.0}, keep=None)
    assert claim_attempt(store, host="h", job_id="j", skip=frozenset({(2, 1)})).from_step == 1
    assert [info.step for info in best_of(live_checkpoints(store), Scores(store), LOW)] == [1]


def test_the_first_score_of_a_step_stays(store: FileStorage) -> None:
    run(store, {1: 5.0}, keep=None)
    put_score(store, 1, 1, Score(metrics={"loss": 1.0}, rule=LOW))
    score = read_score(store, names.step_dir(1, 1))
    assert score == Score(metrics={"loss": 5.0, "accuracy": -5.0}, rule=LOW)


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b'{"metrics": {"loss": "low"}, "best": {}}', b'{"metrics": {"loss": 1}, "best": {"keep": -1}}']
)
def test_a_broken_score_is_none(store: FileStorage, raw: bytes) -> None:
    run(store, {1: 5.0, 2: 4.0}, keep=None)
    (store.root / names.score_key(names.step_dir(2, 1))).write_bytes(raw)
    assert [info.step for info in best_of(live_checkpoints(store), Scores(store), LOW)] == [1]
    run(store, {3: None})
    assert steps(store) == [1, 3]


def test_a_save_that_failed_is_not_rated(store: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(FileStorage, "upload", full)
    saves = checkpointer(store, 1, LOW)
    saves.save(1, SPECS, {"model.weight": [(whole((1, 1)), torch.ones(1, 1))]}, {})
    saves.rate(1, 1, {"loss": 1.0})
    with pytest.raises(OSError, match="full"):
        saves.wait()
    assert not (store.root / names.step_dir(1, 1) / names.SCORE).exists()


def test_a_score_is_no_garbage(store: FileStorage) -> None:
    run(store, {1: 5.0, 2: 4.0}, keep=None)
    assert find_garbage(store, before=math.inf, last_attempt=9).files == ()


def test_load_model_takes_the_best(store: FileStorage) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 4.0}, keep=None, best=None)  # ranked by the loss where nobody says otherwise
    model = nn.Linear(1, 1, bias=False)
    assert load_model(store.url, model, step="best").step == 2
    assert model.weight.item() == 2.0


def test_no_evaluation_no_best(store: FileStorage) -> None:
    run(store, {1: None}, keep=None)
    with pytest.raises(CheckpointError, match=r"no live checkpoint .* has an evaluation .* Live steps there: 1\."):
        load_model(store.url, nn.Linear(1, 1, bias=False), step="best")


# ---- the commands ----


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    ckpt.add_arguments(parser)
    return ckpt.run(parser.parse_args(words))


def test_ls_shows_the_metric_and_marks_the_best(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: math.nan, 4: None}, keep=None)
    assert command("ls", store.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-1] == "EVALUATED"
    assert [line.split(":")[-1][2:].strip() for line in lines[2:6]] == [
        "loss 5.0000",
        "loss 3.0000, best",
        "loss not finite",
        "",
    ]
    assert command("ls", store.url, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["best"] for row in rows] == [False, True, False, False]
    assert [row["metrics"] and row["metrics"]["loss"] for row in rows] == [5.0, 3.0, None, None]


def test_show_of_the_best(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 4.0}, keep=None)
    assert command("show", store.url, "--step", "best", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


@pytest.mark.parametrize(("best", "kept"), [(LOW, [2, 4]), (None, [4])])
def test_prune_leaves_what_the_run_keeps(store: FileStorage, best: BestRule | None, kept: list[int]) -> None:
    run(store, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0}, keep=None, best=best)
    assert command("prune", store.url, "--keep", "1") == 0
    assert steps(store) == kept
