"""Real workers, without agents: every layout learns the same curve, and any layout continues any other's run."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from cases import PARITY, Run, events, failure, metrics, prepare, rank_runner

ASSETS = Path(__file__).parent / "assets"
STEPS = 50
BASE = PARITY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


def losses(folder: Path) -> list[float]:
    records = metrics(folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def assert_same_curve(found: list[float], wanted: list[float], tolerance: float = 1e-6) -> None:
    assert len(found) == len(wanted)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    assert worst <= tolerance, f"relative difference {worst:.2e}"


@pytest.fixture(scope="module")
def reference(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = prepare(tmp_path_factory.mktemp("reference") / "run", "strategy=single")
    assert run(folder, 1) == [0]
    found = losses(folder)
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.5
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_layout_gives_the_losses_of_one_process(
    run: Run, reference: list[float], tmp_path: Path, strategy: str, world_size: int
) -> None:
    folder = prepare(tmp_path / "run", f"strategy={strategy}")
    assert run(folder, world_size) == [0] * world_size
    assert_same_curve(losses(folder), reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_more_ranks_than_samples(run: Run, tmp_path: Path, strategy: str) -> None:
    """Two of four ranks have no sample: they join with a borrowed one that does not count."""
    more = ["data.batch_size=2", "train.steps=10", "train.micro_batch=1"]
    one = prepare(tmp_path / "one", *more)
    four = prepare(tmp_path / "four", *more, f"strategy={strategy}")
    assert run(one, 1) == [0]
    assert run(four, 4) == [0] * 4
    assert_same_curve(losses(four), losses(one))


@pytest.mark.parametrize("declared", [True, False], ids=["count declared", "count from the loss"])
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 3), ("fsdp", 2)])
def test_a_loss_over_tokens_is_an_exact_mean(
    run: Run, tmp_path: Path, strategy: str, world_size: int, declared: bool
) -> None:
    """Samples have different numbers of targets, so a mean of means would differ."""
    base = {
        **BASE,
        "loss": "parity.token_loss",
        "data": {"train": {"_target_": "parity.Tokens", "lengths": True}, "batch_size": 7},
        "train": {"steps": 15, "clip_grad_norm": 1.0},
    } | ({"count": "parity.count_targets"} if declared else {})
    one = prepare(tmp_path / "one", base=base)
    several = prepare(tmp_path / "several", f"strategy={strategy}", "train.micro_batch=2", base=base)
    assert run(one, 1) == [0]
    assert run(several, world_size) == [0] * world_size
    assert_same_curve(losses(several), losses(one))
    assert metrics(several)[-1]["grad_norm"] == pytest.approx(metrics(one)[-1]["grad_norm"], rel=1e-4)


def test_a_layout_continues_anothers_run(run: Run, reference: list[float], tmp_path: Path) -> None:
    """All pairs of layouts: test_any_layout.py."""
    folder = prepare(tmp_path / "first", "strategy=ddp", "checkpoint.every=10", "checkpoint.keep=null")
    assert run(folder, 3) == [0] * 3
    continued = prepare(tmp_path / "second", "strategy=fsdp", f"checkpoint.url={folder / 'checkpoints'}")
    shutil.copy(folder / "metrics.jsonl", continued)
    assert run(continued, 2, attempt=2, resume=[10, 1]) == [0, 0]
    (resumed,) = events(continued, "resumed")
    assert (resumed["strategy"], resumed["world_size"]) == ("ddp", 3)
    assert [record["attempt"] for record in metrics(continued)] == [1] * 10 + [2] * 40
    assert_same_curve(losses(continued), reference)


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp", 3)])
def test_resume_at_the_same_size_gives_the_same_bits(run: Run, tmp_path: Path, strategy: str, world_size: int) -> None:
    """With dropout and a random augmentation, read by loader processes in the second half: neither may matter."""
    more = ["model.dropout=0.1", "data.train.noise=0.1", f"strategy={strategy}", "checkpoint.every=7", "train.steps=20"]
    whole = prepare(tmp_path / "whole", *more)
    assert run(whole, world_size) == [0] * world_size
    halves = prepare(tmp_path / "halves", *more, f"checkpoint.url={whole / 'checkpoints'}", "data.workers=1")
    assert run(halves, world_size, attempt=2, resume=[7, 1]) == [0] * world_size
    assert metrics(halves)[0]["step"] == 8
    assert [(r["loss"], r["grad_norm"]) for r in metrics(halves)] == [
        (r["loss"], r["grad_norm"]) for r in metrics(whole)[7:]
    ]


def test_sigterm_saves_and_ends_with_85(run: Run, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    more = ["strategy=ddp", f"data.train.seen={seen}", "data.train.delay_s=0.01", "train.steps=60"]
    folder = prepare(tmp_path / "run", *more)
    assert run(folder, 2, stop_at=4) == [85, 85]
    done = len(losses(folder))
    assert 0 < done < 60
    (committed,) = events(folder, "checkpoint_committed")
    assert committed["step"] == done
    assert run(folder, 2, attempt=2, resume=[done, 1]) == [0, 0]
    straight = prepare(tmp_path / "straight", *more[:1], "train.steps=60")
    assert run(straight, 2) == [0, 0]
    assert losses(folder) == losses(straight)
    counted = Counter(int(line) for part in tmp_path.glob("seen.*") for line in part.read_text().split())
    # 60 steps of 13 are 2 epochs of 300 and 180 more; a rank may have read the batch that it then left out, 7 samples
    # or 6, or the first micro-batch of it.
    assert sum(counted.values()) - 780 in {a + b for a in (0, 3, 7) for b in (0, 3, 6)}
    assert set(counted) == set(range(300))


def test_a_loss_that_is_not_finite_stops_before_the_update(run: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "strategy=ddp", "optimizer.lr=1e20", "schedule=constant")
    assert set(run(folder, 2)) <= {1, -9}
    last = metrics(folder)[-1]
    assert last["loss"] is None or last["grad_norm"] is None
    assert last["nonfinite"]
    assert failure(folder)["kind"] == "nonfinite"


def test_evaluation_counts_every_sample_once(run: Run, tmp_path: Path) -> None:
    """37 samples over 3 ranks in batches of 13, and the same in one process."""
    base = {**BASE, "data": {**BASE["data"], "eval": {"_target_": "parity.Tokens", "samples": 37}}}
    more = ["train.steps=4", "train.eval_every=2", "schedule.warmup=0"]
    one = prepare(tmp_path / "one", *more, base=base)
    three = prepare(tmp_path / "three", *more, "strategy=fsdp", base=base)
    assert run(one, 1) == [0]
    assert run(three, 3) == [0] * 3
    wanted, found = ([e["metrics"]["loss"] for e in events(folder, "evaluated")] for folder in (one, three))
    assert len(wanted) == 2
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=fsdp", "strategy.wrap=[nothing.*]"], ["strategy.wrap", "nothing.*"]),
        (["strategy=fsdp", "optimizer={_target_: torch.optim.Adafactor}"], ["Adafactor", "elementwise"]),
        (['optimizer.groups=[{match: "*.nothing", weight_decay: 0}]'], ["optimizer.groups", "*.nothing"]),
        (["data.train.samples=0"], ["data.train", "empty"]),
    ],
)
def test_what_only_the_node_can_see_is_said_and_not_tried_again(
    run: Run, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    folder = prepare(tmp_path / "run", *overrides)
    assert 93 in run(folder, 2)
    report = failure(folder)
    assert report["retry"] is False
    assert all(word in report["message"] for word in words)


FAULTS = {
    "new": ["data.train={_target_: faulty.Data, at: new}"],
    "item": ["data.train={_target_: faulty.Data, at: item}", "train.steps=25"],
    "item, in a loader process": ["data.train={_target_: faulty.Data, at: item}", "train.steps=25", "data.workers=1"],
    "collate": ["data.collate=faulty.collate"],
    "collate, in a loader process": ["data.collate=faulty.collate", "data.workers=1"],
    "loss": ["loss=faulty.loss"],
    "model": ["model={_target_: faulty.Unbuilt}"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_the_users_code_names_its_line(run: Run, tmp_path: Path, fault: str) -> None:
    folder = prepare(tmp_path / "run", *FAULTS[fault])
    assert run(folder, 1) == [1]
    found = failure(folder)
    marker = f"# {fault.partition(',')[0]}"
    lines = (ASSETS / "faulty.py").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, start=1) if line.endswith(marker))
    assert found["where"].endswith(f"faulty.py:{number}")
    assert not found["victim"]
    assert lines[number - 1].strip() in "\n".join(found["evidence"])
    if marker == "# item":
        assert "sample 5 of data.train" in found["message"]


def test_micro_batches_without_anything_to_count_change_nothing(run: Run, tmp_path: Path) -> None:
    """The mean over their targets, of which there are none, is NaN, forward and backward."""
    base = {
        **BASE,
        "loss": "faulty.nan_for_nothing",
        "count": "parity.count_targets",
        "data": {"train": {"_target_": "faulty.FewTargets"}, "batch_size": 13},
        "train": {"steps": 6},
    }
    one = prepare(tmp_path / "one", base=base)
    three = prepare(tmp_path / "three", "strategy=fsdp", "train.micro_batch=1", base=base)
    assert run(one, 1) == [0]
    assert run(three, 3) == [0] * 3
    assert_same_curve(losses(three), losses(one))


EVALUATED = {**BASE, "data": {**BASE["data"], "eval": {"_target_": "parity.Tokens", "samples": 40}}}


def test_a_stop_during_an_evaluation_loses_neither_steps_nor_the_evaluation(run: Run, tmp_path: Path) -> None:
    more = ["schedule.warmup=0", "train.steps=4", "train.eval_every=2", "on_end=faulty.say_end", "data.workers=1"]
    folder = prepare(tmp_path / "run", *more, "data.eval.delay_s=0.2", base=EVALUATED)  # 8 s on one rank
    assert run(folder, 1, stop_at=2) == [85]
    assert [event["step"] for event in events(folder, "checkpoint_committed")] == [2]
    assert not events(folder, "evaluated")
    continued = prepare(
        tmp_path / "continued", *more, "strategy=ddp", f"checkpoint.url={folder / 'checkpoints'}", base=EVALUATED
    )
    assert run(continued, 2, attempt=2, resume=[2, 1]) == [0, 0]
    assert [event["step"] for event in events(continued, "evaluated")] == [2, 4]
    again = prepare(tmp_path / "again", *more, f"checkpoint.url={folder / 'checkpoints'}", base=EVALUATED)
    assert run(again, 1, attempt=3, resume=[4, 2]) == [0]
    (evaluated,) = events(again, "evaluated")
    assert evaluated["metrics"]["loss"] == pytest.approx(events(continued, "evaluated")[1]["metrics"]["loss"], rel=1e-6)
    assert events(again, "result")[0]["text"].startswith("the end of")


def test_fewer_steps_than_done_end_at_once(run: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "schedule.warmup=0", "train.steps=3")
    assert run(folder, 1) == [0]
    common = ["schedule.warmup=0", f"checkpoint.url={folder / 'checkpoints'}"]
    fewer = prepare(tmp_path / "fewer", *common, "train.steps=2")
    assert run(fewer, 1, attempt=2, resume=[3, 1]) == [0]
    more = prepare(tmp_path / "more", *common, "train.steps=5")
    assert run(more, 1, attempt=3, resume=[3, 1]) == [0]
    assert [record["step"] for record in metrics(more)] == [4, 5]


def test_a_save_that_fails_is_reported_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "train.steps=8", "checkpoint.every=2", "checkpoint.keep=null")
    assert run(folder, 2, full_at=[4]) == [0, 0]
    (failed,) = events(folder, "checkpoint_failed")
    assert "step-00000004" in failed["message"]
    assert "no space left" in failed["message"]
    assert [event["step"] for event in events(folder, "checkpoint_committed")] == [2, 6, 8]
    assert len(losses(folder)) == 8


@pytest.mark.parametrize("full_at", [[4, 6], [8]], ids=["two in a row", "the last one"])
def test_a_run_does_not_end_as_if_its_state_were_safe(run: Run, tmp_path: Path, full_at: list[int]) -> None:
    folder = prepare(tmp_path / "run", "train.steps=8", "checkpoint.every=2")
    assert run(folder, 1, full_at=full_at) == [1]
    assert "no space left" in failure(folder)["message"]
