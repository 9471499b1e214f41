"""Real workers: metrics, closures and forwards of a user's own in any layout, and runs that end early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
from cases import Run, events, losses, rank_runner

from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint.attempts import claim_attempt

ASSETS = Path(__file__).parent / "assets"
BASE: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "layers": 1, "width": 64},
    "loss": "parity.token_loss",
    "data": {
        "train": {"_target_": "parity.Tokens", "lengths": True},
        "eval": {"_target_": "parity.Tokens", "samples": 37, "lengths": True},
        "batch_size": 13,
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": 8, "micro_batch": 4},
}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


def prepare(folder: Path, *overrides: str, **sections: Any) -> Path:
    base = {key: value for key, value in {**BASE, **sections}.items() if value is not None}
    return cases.prepare(folder, *overrides, base=base)


def records(folder: Path, name: str = "evaluations") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def reports(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"report-{rank}.jsonl").read_text().splitlines()]


def test_metrics_are_the_same_numbers_in_any_layout(run: Run, tmp_path: Path) -> None:
    """37 samples over 3 ranks in micro-batches of 4: borrowed ones must not count."""
    more = ["train.steps=4", "train.eval_every=2", "metrics=measures.counted"]
    one, three = prepare(tmp_path / "one", *more), prepare(tmp_path / "three", *more, "strategy=fsdp")
    assert run(one, 1) == [0]
    assert run(three, 3) == [0] * 3
    wanted, found = records(one), records(three)
    assert [list(record) for record in wanted] == [["step", "attempt", "loss", "accuracy", "first"]] * 2
    assert [record["step"] for record in found] == [2, 4]
    for key in ("loss", "accuracy", "first"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in wanted], rel=1e-6)
    assert events(three, "evaluated")[0]["metrics"] == {key: found[0][key] for key in ("loss", "accuracy", "first")}


@pytest.mark.parametrize(
    "instead",
    [{"loss": None, "loss_closure": "measures.closure"}, {"data": {**BASE["data"], "forward": "measures.by_keyword"}}],
    ids=["loss_closure", "data.forward"],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_closure_and_forward_give_the_same_curve(
    run: Run, tmp_path: Path, strategy: str, instead: dict[str, Any]
) -> None:
    plain = prepare(tmp_path / "plain", f"strategy={strategy}")
    own = prepare(tmp_path / "own", f"strategy={strategy}", **instead)
    assert run(plain, 2) == run(own, 2) == [0, 0]
    assert losses(own) == losses(plain)
    assert records(own) == records(plain)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ("measures.names_by_rank", "the ranks found different names"),
        ("measures.fails", "planted\n(on batch 1 of data.eval (samples [6, 7, 8]), the model in eval mode)"),
    ],
)
def test_an_error_in_metrics_ends_every_rank(run: Run, tmp_path: Path, metrics: str, words: str) -> None:
    folder = prepare(tmp_path / "run", "train.steps=1", f"metrics={metrics}", "strategy=ddp")
    codes = run(folder, 2)
    assert codes[1] in (1, 93)
    (failure,) = (report for report in reports(folder, 1) if report["type"] == "failure")
    assert words in failure["message"]
    if metrics == "measures.fails":
        number = next(n for n, x in enumerate((ASSETS / "measures.py").read_text().splitlines(), 1) if "# metrics" in x)
        assert failure["where"].endswith(f"measures.py:{number}")


STILL = ["optimizer.lr=0", "train.steps=30", "train.eval_every=2", "checkpoint.every=3", "checkpoint.keep=null"]
RULE = "train.early_stop={metric: loss, patience: 3, min_delta: 1e-3}"


def test_a_run_ends_early_at_the_same_step_however_it_was_interrupted(run: Run, tmp_path: Path) -> None:
    """Nothing is learned: of the evaluations after steps 2, 4, 6, 8 the first is the best, and the fourth ends it."""
    straight = prepare(tmp_path / "straight", *STILL, RULE, "strategy=ddp", "on_end=faulty.say_end")
    assert run(straight, 2) == [0, 0]
    (stopped,) = events(straight, "stopped_early")
    assert stopped["step"] == 8
    assert stopped["reason"].startswith("stopped early at step 8: loss did not improve for 3 evaluations (best 6.9")
    assert stopped["reason"].endswith("at step 2)")
    assert len(losses(straight)) == 8
    assert [event["step"] for event in events(straight, "checkpoint_committed")] == [3, 6, 8]
    assert events(straight, "result")

    # Step 6 was saved before it was evaluated: its evaluation is counted once, in another layout, too.
    common = [*STILL, RULE, "strategy=fsdp", f"checkpoint.url={straight / 'checkpoints'}"]
    resumed = prepare(tmp_path / "resumed", *common)
    assert run(resumed, 3, attempt=2, resume=[6, 1]) == [0] * 3
    assert [record["step"] for record in records(resumed)] == [6, 8]
    assert events(resumed, "stopped_early")[0]["reason"][:60] == stopped["reason"][:60]
    # And a run that was over stays over.
    again = prepare(tmp_path / "again", *common)
    assert run(again, 1, attempt=3, resume=[8, 2]) == [0]
    assert [event["step"] for event in events(again, "stopped_early")] == [8]
    assert losses(again) == []
    # Unless it is asked for more patience, which counts on.
    patient = prepare(tmp_path / "patient", *common, "train.early_stop.patience=5")
    assert run(patient, 1, attempt=4, resume=[8, 2]) == [0]
    assert [event["step"] for event in events(patient, "stopped_early")] == [12]


def test_evaluations_that_a_new_attempt_repeats_are_recorded_once(run: Run, tmp_path: Path) -> None:
    more = ["train.steps=8", "train.eval_every=2", "checkpoint.every=4", "checkpoint.keep=null"]
    folder = prepare(tmp_path / "run", *more)
    assert run(folder, 1) == [0]
    assert run(folder, 1, attempt=2, resume=[4, 1]) == [0]
    assert [(record["step"], record["attempt"]) for record in records(folder)] == [(2, 1), (4, 2), (6, 2), (8, 2)]


def test_the_best_checkpoint_survives_a_restart_that_goes_on_before_it(run: Run, tmp_path: Path) -> None:
    """The height after steps 2, 4, .. 12 is 4, 2, 0, 2, 4, 6: step 6 stays, though it is old and by an old attempt."""
    model = {"_target_": "measures.Counts", "layers": 1, "width": 32}
    more = ["metrics=measures.valley", "train.eval_every=2", "checkpoint.keep=1", "train.micro_batch=null"]
    rule = "checkpoint.best={metric: height, mode: min, keep: 1}"
    folder = prepare(tmp_path / "run", *more, rule, "train.steps=12", model=model)
    store = FileStorage(str(folder / "checkpoints"))
    claim_attempt(store, host="h", job_id="j")
    assert run(folder, 2) == [0, 0]
    assert [event["step"] for event in events(folder, "checkpoint_committed")] == [2, 4, 6, 8, 10, 12]
    assert [record["height"] for record in records(folder)] == [4, 2, 0, 2, 4, 6]
    assert checkpoints(folder) == ["step-00000006-a0001", "step-00000012-a0001"]
    claim_attempt(store, host="h", job_id="j", fresh_from=(6, 1))
    assert run(folder, 1, attempt=2, resume=[6, 1]) == [0]
    assert checkpoints(folder) == ["step-00000006-a0001", "step-00000012-a0002"]
    found = json.loads((folder / "checkpoints/step-00000006-a0001/evaluation.json").read_text())
    assert found["metrics"]["height"] == 0
    assert found["best"] == {"metric": "height", "mode": "min", "keep": 1}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
