"""Trackers against the real things: TensorBoard's own reader, and a real MLflow store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.cluster.errors import ConfigError
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.launcher.compose import load_config
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.tracking.feed import TrackerFeed

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).parent / "assets"
DTRAIN = Path(sys.executable).parent / "dtrain"
NEEDS = "needs the trackers: pip install 'dtrain[tensorboard,mlflow]'"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: tracked\ntrain: {steps: 9}\nlist: [1, 2]\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return RunDir(tmp_path / "run")


def attempt(run: RunDir, trackers: Sequence[str], *, start: int, end: int, add: float = 0.0) -> list[str]:
    """What one attempt writes and what the trackers had to say. It evaluates every other step, `start` again."""
    said: list[str] = []
    log, evaluations = MetricsLog(run.metrics, start), MetricsLog(run.evaluations, start - 1)
    with log, evaluations, TrackerFeed(run.path, trackers, start, said.append):
        if start:
            evaluations.write({"step": start, "attempt": 1, "loss": -start})
        for step in range(start + 1, end + 1):
            log.write({"step": step, "attempt": 1, "loss": step + add, "lr": 0.5, "grad_norm": float("nan")})
            if step % 2 == 0 and step < end:  # the last one is interrupted
                evaluations.write({"step": step, "attempt": 1, "loss": -step})
    return said


def events(run: RunDir) -> Any:
    """By TensorBoard's own reader. Imports of trackers take seconds: only where they are used."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=NEEDS)
    reader = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    return reader


def mlflow_client(uri: str) -> Any:
    return pytest.importorskip("mlflow.tracking", reason=NEEDS).MlflowClient(uri)


def scalars(run: RunDir, tag: str) -> list[tuple[int, float]]:
    reader = events(run)
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def history(run: RunDir, key: str) -> list[tuple[int, float]]:
    record = read_json(run.path / "mlflow.json")
    assert record is not None
    found = mlflow_client(record["tracking_uri"]).get_metric_history(record["run_id"], key)
    return sorted((metric.step, metric.value) for metric in found)


def test_tensorboard_shows_what_a_later_attempt_made_of_a_step(run: RunDir) -> None:
    assert attempt(run, ["tensorboard"], start=0, end=6) == []
    attempt(run, ["tensorboard"], start=4, end=9, add=0.5)
    assert scalars(run, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), *((step, step + 0.5) for step in range(5, 10))]
    reader = events(run)
    assert scalars(run, "eval/loss") == [(2, -2), (4, -4), (6, -6), (8, -8)]
    assert set(reader.Tags()["scalars"]) == {"loss", "lr", "eval/loss"}, "a gradient norm of nan is no point"
    assert b"name: tracked" in reader.Tensors("config")[0].tensor_proto.string_val[0]


def test_mlflow_has_one_run_and_each_step_once(run: RunDir) -> None:
    assert attempt(run, ["mlflow"], start=0, end=6) == []
    attempt(run, ["mlflow"], start=4, end=9)
    assert history(run, "loss") == [(step, float(step)) for step in range(1, 10)]
    assert history(run, "eval/loss") == [(2, -2.0), (4, -4.0), (6, -6.0), (8, -8.0)]
    record = read_json(run.path / "mlflow.json")
    assert record is not None
    client = mlflow_client(record["tracking_uri"])
    (found,) = client.search_runs(["0"])
    assert found.info.run_id == record["run_id"]
    assert (found.info.run_name, found.info.status) == ("tracked", "FINISHED")
    assert found.data.params == {"name": "tracked", "train.steps": "9", "list": "[1, 2]"}


def test_a_server_that_is_not_there_is_told_of_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And keeps neither the other tracker nor the training from anything."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("dtrain.runtime.tracking.feed.DRAIN_S", -8.0)  # it will not come
    said = attempt(run, ["mlflow", "tensorboard"], start=0, end=3)
    assert len(said) <= 1
    assert all(text.startswith("mlflow: ") and "training goes on" in text for text in said)
    assert not (run.path / "mlflow.json").exists()
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_a_store_that_comes_back_gets_everything(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of its database is made only after the first try has failed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/locked/mlflow.db")
    (tmp_path / "locked").write_text("in the way")
    said: list[str] = []
    log = MetricsLog(run.metrics, 0)
    with log, TrackerFeed(run.path, ["mlflow"], 0, said.append):
        log.write({"step": 1, "attempt": 1, "loss": 1.0})
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        (tmp_path / "locked").unlink()
        (tmp_path / "locked").mkdir()
        log.write({"step": 2, "attempt": 1, "loss": 2.0})
    assert history(run, "loss") == [(1, 1.0), (2, 2.0)]
    assert said[1:] == ["mlflow is reached again"]


@pytest.mark.parametrize(
    ("track", "words"),
    [
        ("[tensorbord]", "Did you mean tensorboard?"),
        ("tensorboard", "Put it in square brackets."),
        ("[mlflow, tensorboard, mlflow]", "mlflow is there twice"),
    ],
)
def test_a_wrong_tracker_is_found_before_anything_starts(tmp_path: Path, track: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(config_file(tmp_path, track))


def test_a_missing_package_is_found_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.launcher.checks.PACKAGES", {"mlflow": ("no_such_package", "mlflow")})
    with pytest.raises(ConfigError, match=r"pip install 'dtrain\[mlflow\]'"):
        load_config(config_file(tmp_path, "[mlflow]"))


def config_file(tmp_path: Path, track: str) -> Path:
    config: dict[str, Any] = {
        "model": {"_target_": "parity.Transformer"},
        "loss": "parity.mean_loss",
        "data": {
            "train": {"_target_": "parity.Tokens", "delay_s": 0.01},
            "eval": {"_target_": "parity.Tokens"},
            "batch_size": 8,
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
        "train": {"steps": 60, "eval_every": 20},
        "checkpoint": {"every": 10},
        "cluster": {"nodes": 2},
    }
    path = tmp_path / "tracked.yaml"
    path.write_text(json.dumps(config)[:-1] + f', "track": {track}}}')
    return path


@pytest.mark.e2e
def test_a_run_that_is_killed_and_relaunched_shows_each_step_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ASSETS),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    command = [str(DTRAIN), "launch", "--run-dir", str(run.path), str(config_file(tmp_path, "[tensorboard, mlflow]"))]
    launched = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until_step(run, 25, launched)
    os.kill(worker(run, 0), signal.SIGKILL)  # beside its tracker
    until_step(run, 35, launched)
    launched.send_signal(signal.SIGINT)
    output, _ = launched.communicate(timeout=800)
    assert launched.returncode == 85, output
    assert subprocess.run(command, env=environment, timeout=300, capture_output=True).returncode == 0
    expected = [(record["step"], record["loss"]) for record in read_jsonl(run.metrics)]
    assert [step for step, _ in expected] == list(range(1, 61))
    assert scalars(run, "loss") == expected
    assert history(run, "loss") == expected
    assert [step for step, _ in scalars(run, "eval/loss")] == [20, 40, 60]
    assert [step for step, _ in history(run, "eval/loss")] == [20, 40, 60]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or [])]


def worker(run: RunDir, global_rank: int) -> int:
    """Its pid, from the file: `dtrain status` takes as long to start as some steps."""
    status = read_json(run.control(json.loads(run.job.read_text())["job_id"]).status) or {}
    return next(int(found["pid"]) for found in status["workers"] if found["global_rank"] == global_rank)


def until_step(run: RunDir, step: int, launched: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(record["step"] >= step for record in read_jsonl(run.metrics)):
        assert launched.poll() is None, launched.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
