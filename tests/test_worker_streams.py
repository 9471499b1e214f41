"""Real workers on iterable data sets: the curve of one process at any world size, exact after a stop, a resize and a
kill; streams that end unevenly hang nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cases
import pytest
from cases import Run, events, metrics, rank_runner

ASSETS = Path(__file__).parent / "assets"
LENGTHS = [19, 7, 23, 11, 16]
BASE: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "dropout": 0.1},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "streams.Sequences", "lengths": LENGTHS}, "batch_size": 10, "streams": 4},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": 20, "micro_batch": 3},
    "strategy": "ddp",
}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner()


def prepare(folder: Path, *overrides: str, base: dict[str, Any] = BASE) -> Path:
    return cases.prepare(folder, *overrides, base=base)


def losses(folder: Path) -> list[float]:
    records = metrics(folder)
    assert [record["step"] for record in records] == list(range(records[0]["step"], records[0]["step"] + len(records)))
    return [record["loss"] for record in records]


def seen(folder: Path) -> Counter[str]:
    return Counter(line for part in folder.glob("seen.*") for line in part.read_text().split())


def test_every_world_size_gives_the_losses_of_one_process(run: Run, tmp_path: Path) -> None:
    """4 streams of unequal lengths over 1 to 4 ranks: owned, shared and, at 3, all read by all."""
    curves = []
    for world_size in (1, 2, 3, 4):
        folder = prepare(tmp_path / str(world_size), "model.dropout=0")
        assert run(folder, world_size) == [0] * world_size
        curves.append(losses(folder))
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_resume_at_the_same_size_gives_the_same_bits(run: Run, tmp_path: Path, world_size: int) -> None:
    whole = prepare(tmp_path / "whole", "checkpoint.every=7")
    assert run(whole, world_size) == [0] * world_size
    halves = prepare(tmp_path / "halves", f"checkpoint.url={whole / 'checkpoints'}", "data.workers=1")
    assert run(halves, world_size, attempt=2, resume=[7, 1]) == [0] * world_size
    assert losses(halves) == losses(whole)[7:]


def test_any_world_size_continues_any_others_run(run: Run, tmp_path: Path) -> None:
    """2 ranks, then 4 with fsdp, then 3: the curve and the samples of one process."""
    whole = prepare(tmp_path / "whole", "model.dropout=0")
    assert run(whole, 1) == [0]
    url = f"checkpoint.url={tmp_path / 'checkpoints'}"
    found: list[float] = []
    for attempt, (world_size, steps) in enumerate([(2, 6), (4, 13), (3, 20)], start=1):
        more = ["strategy=fsdp"] if world_size == 4 else []
        folder = prepare(tmp_path / str(world_size), url, f"train.steps={steps}", "model.dropout=0", *more)
        resume = {"resume": [len(found), attempt - 1]} if found else {}
        assert run(folder, world_size, attempt=attempt, **resume) == [0] * world_size
        found += losses(folder)
    assert found == pytest.approx(losses(whole), rel=1e-6)


def test_sigterm_keeps_what_was_used_and_not_what_was_read_ahead(run: Run, tmp_path: Path) -> None:
    data = f"data.train={{_target_: streams.Sequences, lengths: {LENGTHS}, delay_s: 0.01}}"
    folder = prepare(tmp_path / "run", data, "train.steps=60", "data.workers=1")
    assert run(folder, 2, stop_at=4) == [85, 85]
    done = len(losses(folder))
    assert 0 < done < 60
    assert run(folder, 2, attempt=2, resume=[done, 1]) == [0, 0]
    straight = prepare(tmp_path / "straight", "train.steps=60")
    assert run(straight, 2) == [0, 0]
    assert losses(folder) == losses(straight)


def test_each_rank_reads_its_own_streams_only(run: Run, tmp_path: Path) -> None:
    """76 samples in 4 streams; each epoch of a stream is read once, by one of the two ranks."""
    folder = prepare(tmp_path / "run", f"data.train.seen={tmp_path / 'seen'}")
    assert run(folder, 2) == [0, 0]
    assert sum(seen(tmp_path).values()) == 200
    files = [{line.split("/")[0] for line in part.read_text().split()} for part in tmp_path.glob("seen.*")]
    assert sorted(sorted(mine) for mine in files) == [["0", "2", "4"], ["1", "3"]]
    (chosen,) = events(folder, "chosen")
    assert "data      iterable, 4 streams, 2 a rank" in chosen["lines"]


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 0), ("fsdp", 1)])
def test_an_evaluation_of_uneven_streams_is_exact(run: Run, tmp_path: Path, strategy: str, workers: int) -> None:
    """One stream holds 30 of 34 samples: the other rank joins with borrowed ones, until all have ended."""
    base = {**BASE, "data": {**BASE["data"], "streams": 2}}
    base["data"]["eval"] = {"_target_": "streams.SequencesWithoutState", "lengths": [30, 4]}
    more = ["train.steps=2", "model.dropout=0", f"data.workers={workers}"]
    found = []
    for world_size in (1, 2, 3):
        folder = prepare(tmp_path / str(world_size), *more, f"strategy={strategy}", base=base)
        assert run(folder, world_size) == [0] * world_size
        (evaluated,) = events(folder, "evaluated")
        found.append(evaluated["metrics"]["loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_what_cant_be_put_back_is_refused_before_the_first_step(run: Run, tmp_path: Path) -> None:
    data = f"data.train={{_target_: streams.SequencesWithoutState, lengths: {LENGTHS}}}"
    folder = prepare(tmp_path / "run", data)
    assert 93 in run(folder, 2)
    text = "".join(path.read_text() for path in folder.glob("report-*.jsonl"))
    assert "data.resume: skip" in text
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()
    asked = prepare(tmp_path / "asked", data, "data.resume=skip")
    assert run(asked, 2) == [0, 0]
    exact = prepare(tmp_path / "exact")
    assert run(exact, 2) == [0, 0]
    assert losses(asked) == losses(exact)


def test_a_killed_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    """The whole way, agents included: kill -9 of a worker in the middle."""
    config = tmp_path / "cfg.yaml"
    config.write_text(json.dumps({**BASE, "checkpoint": {"every": 4}, "cluster": {"nodes": 2}, "name": "streams"}))
    data = f"data.train={{_target_: streams.Sequences, lengths: {LENGTHS}, delay_s: 0.02}}"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ASSETS), "HOME": str(tmp_path)}

    def launch(run_dir: str, *more: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "dtrain.launcher.cli", "launch"]
        command = [*launcher, "--run-dir", str(tmp_path / run_dir), str(config)]
        return subprocess.Popen([*command, *more], env=environ, stdout=subprocess.DEVNULL, cwd=tmp_path)

    with launch("killed", data) as process:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 6):
            assert process.poll() is None
            time.sleep(0.05)
        status = json.loads(
            subprocess.check_output(
                [sys.executable, "-m", "dtrain.launcher.cli", "status", "--json", str(tmp_path / "killed")], env=environ
            )
        )
        os.kill(next(w["pid"] for w in status["workers"] if w["global_rank"] == 1), signal.SIGKILL)
        assert process.wait(120) == 0
    with launch("straight") as process:
        assert process.wait(120) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "killed")) == 20
