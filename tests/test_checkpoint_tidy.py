"""`dtrain ckpt prune` and `dtrain ckpt gc`: what goes, and above all what stays."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.launcher.commands import ckpt
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.strategies.boxes import TensorSpec, replicated, whole

DAY_S = 86400.0


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    ckpt.add_arguments(parser)
    return ckpt.run(parser.parse_args(words))


def save(store: FileStorage, attempt: int, *steps: int) -> None:
    specs = [TensorSpec(name="model.w", dtype="F32", shape=(10,), layout=replicated(1, 1))]
    checkpointer = Checkpointer(
        store, attempt=attempt, rank=0, world_size=1, strategy={"name": "ddp"}, board=LocalBoard(),
        on_commit=lambda done: None, keep=None,
    )  # fmt: skip
    for step in steps:
        checkpointer.save(step, specs, {"model.w": [(whole((10,)), torch.ones(10))]}, {})
    checkpointer.wait()


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    """runs/x/checkpoints: steps 1 to 4 by attempt 1, of which 4 is dead, and 4 and 5 by attempt 2."""
    store = FileStorage(str(tmp_path / "runs" / "x" / "checkpoints"))
    claim_attempt(store, host="h", job_id="j")
    save(store, 1, 1, 2, 3, 4)
    claim_attempt(store, host="h", job_id="j", skip=frozenset({(4, 1)}))
    save(store, 2, 4, 5)
    return store


def steps(store: FileStorage) -> list[tuple[int, int]]:
    return [(info.step, info.attempt) for info in live_checkpoints(store)]


def tree(store: FileStorage) -> set[str]:
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


def leave(store: FileStorage, step: int, attempt: int, age_s: float) -> str:
    """A file without a manifest, and beside it an upload that was never completed."""
    key = f"{names.step_dir(step, attempt)}/rank-00000.safetensors"
    store.put_if_absent(key, b"left over")
    (store.root / key).with_name(".rank-00001.upload-1-2-3").write_bytes(b"half")
    then = time.time() - age_s
    for path in (store.root / key).parent.iterdir():
        os.utime(path, (then, then))
    return key


def job(tmp_path: Path, store: FileStorage, *, over: bool) -> None:
    """runs/x is a run whose processes are on another host, or one that has ended."""
    plan = JobPlan(
        name="x", run_dir=str(tmp_path / "runs" / "x"), job_id="j1", backend="local", nodes=1, procs_per_node=1,
        gpus_per_node=0, threads_per_proc=1, python="python", argv=(), cwd=str(tmp_path), sys_path=(), env={},
        checkpoint_url=str(store.root), workers="warm", max_restarts_without_progress=3,
    )  # fmt: skip
    directory = RunDir(tmp_path / "runs" / "x")
    directory.job.write_text(json.dumps({**plan.to_json(), "submitted_at": time.time()}))
    control = directory.control("j1")
    control.path.mkdir(parents=True, exist_ok=True)
    if over:
        control.ended.write_text(json.dumps({"state": "done", "exit_code": 0, "reason": "", "step": 5, "at": 1.0}))


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_prune_keeps_the_newest_live_ones(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "runs/x", "--keep", "2") == 0
    assert steps(store) == [(4, 2), (5, 2)]
    out = capsys.readouterr().out.splitlines()
    assert out[3] == "gone: step 4 of attempt 1 (dead)"
    assert out[4].startswith("4 checkpoints and 8 files, ")
    assert out[4].endswith("gone; 2 checkpoints kept.")
    assert len(tree(store)) == 2 * 3 + 2
    for info in live_checkpoints(store):
        assert verify_checkpoint(store, info) == []


def test_a_dry_run_deletes_nothing(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    leave(store, 50, 1, 2 * DAY_S)
    before = tree(store)
    assert run("prune", "runs/x", "--keep", "1", "--dry-run", "--json") == 0
    told = printed(capsys)
    assert [entry["step"] for entry in told["deleted"]] == [1, 2, 3, 4, 4]
    assert run("gc", "runs/x", "--dry-run") == 0
    assert "would go: step-00000050-a0001/rank-00000.safetensors" in capsys.readouterr().out
    assert tree(store) == before
    assert run("prune", "runs/x", "--keep", "1", "--json") == 0
    assert {**printed(capsys), "dry_run": True} == told


def test_prune_does_not_count_what_is_damaged(store: FileStorage) -> None:
    (store.root / names.step_dir(5, 2) / "rank-00000.safetensors").unlink()
    assert run("prune", "runs/x", "--keep", "1") == 0
    assert steps(store) == [(4, 2), (5, 2)]


def test_prune_never_deletes_the_newest(store: FileStorage) -> None:
    with pytest.raises(UsageError, match="the newest live checkpoint always stays"):
        run("prune", "runs/x", "--keep", "0")
    assert len(steps(store)) == 6


def test_prune_with_nothing_live_deletes_nothing(store: FileStorage) -> None:
    claim_attempt(store, host="h", job_id="j", fresh_from=(0, 0))
    with pytest.raises(CheckpointError, match=r"none of the 6 checkpoints .* is live"):
        run("prune", "runs/x", "--keep", "1")
    assert len(steps(store)) == 6


def test_gc_takes_what_is_old_and_unnamed_and_no_more(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(store)
    old, young, newest = leave(store, 50, 1, 2 * DAY_S), leave(store, 51, 1, DAY_S / 2), leave(store, 52, 2, 2 * DAY_S)
    (store.root / "notes.txt").write_text("not ours")
    os.utime(store.root / "notes.txt", (0, 0))
    for path in store.root.rglob("manifest.json"):
        os.utime(path, (0, 0))
    assert run("gc", "runs/x", "--json") == 0
    told = printed(capsys)
    assert told["files"] == [old]
    assert told["uploads"] == 2  # an upload without a commit for a day belongs to nobody, whoever began it
    assert told["spared"] == [young, newest]
    assert tree(store) - before == {
        young, str(Path(young).with_name(".rank-00001.upload-1-2-3")), newest, "notes.txt",
    }  # fmt: skip
    assert before <= tree(store)


def test_gc_of_a_run_that_is_over(store: FileStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nobody writes: the newest attempt's go too, however young. The run is known by its checkpoints' URL too."""
    before = tree(store)
    job(tmp_path, store, over=False)
    leave(store, 50, 2, 10.0)
    with pytest.raises(UsageError, match=r"x \(.*runs/x\) is not known to be over. Ask for 1h 00m or more"):
        run("gc", "runs/x", "--older-than", "1s")
    job(tmp_path, store, over=True)
    assert run("gc", store.url, "--older-than", "1s") == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("gone; 1 uncompleted upload gone.")
    assert tree(store) == before


def test_gc_of_a_store_that_nobody_here_writes_to(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    leave(store, 50, 2, 2 * DAY_S)
    with pytest.raises(UsageError, match="No run that writes there is known here"):
        run("gc", store.url, "--older-than", "59min")
    assert run("gc", store.url) == 0
    out = capsys.readouterr().out
    assert "1 file that no checkpoint names left: younger than 24h 00m, or of the newest attempt." in out


def test_gc_keeps_what_lies_beside_a_damaged_manifest(store: FileStorage) -> None:
    (store.root / names.step_dir(2, 1) / "manifest.json").write_bytes(b"garbage")
    for path in store.root.rglob("*"):
        os.utime(path, (0, 0))
    before = tree(store)
    assert run("gc", "runs/x") == 0
    assert tree(store) == before


@pytest.mark.parametrize("words", ["24", "yesterday", "-1h", ""])
def test_a_wrong_age_is_refused(store: FileStorage, capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit):
        run("gc", "runs/x", f"--older-than={words}")
    assert "expects a time (30min, 24h, 7d)" in capsys.readouterr().err
