"""The parity case as run directories, and real workers over them without agents: what tests of layouts and precisions
share. The workers are rank_runner.py's, forks of one rank_parent.py."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dtrain.launcher.compose import dump_resolved, load_config

ASSETS = Path(__file__).parent
Run = Callable[..., list[int]]
Ask = Callable[..., list[Any]]

PARITY: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer"},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "parity.Tokens"}, "batch_size": 13},  # divided by no world size of 2, 3, 4
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001, "groups": [{"match": "*norm*", "weight_decay": 0.0}]},
    "schedule": {"name": "cosine", "warmup": 5},
    "train": {"steps": 50, "clip_grad_norm": 1.0, "micro_batch": 4},
}


def needs(package: str, reason: str, *, module: bool = False) -> None:
    """Skips the test, or with `module` all of a file, where `package` is not installed. Importing it to find out
    (pytest.importorskip) would take each test process seconds, and the ranks are other processes."""
    if find_spec(package) is None:
        pytest.skip(reason, allow_module_level=module)


def rank_runner(environ: dict[str, str] | None = None, *, preload: Sequence[str] = ()) -> Run:
    """run(run_dir, world_size, ...) -> exit codes, of ranks with `environ` that have imported `preload` already."""

    def run_case(run_dir: Path, world_size: int, **more: Any) -> list[int]:
        return _parent().answer("run", preload, environ, {"run_dir": str(run_dir), "world_size": world_size, **more})

    _parent()
    return run_case


def rank_functions(environ: dict[str, str] | None = None, *, module: str = "", preload: Sequence[str] = ()) -> Ask:
    """ask("module.function", world_size, ...): what it returns on each rank. With `module` its functions are asked for
    by their names alone."""

    def ask(call: str, world_size: int, **kwargs: Any) -> list[Any]:
        name = f"{module}.{call}" if module else call
        return _parent().answer("ask", preload, environ, {"call": name, "world_size": world_size, "kwargs": kwargs})

    _parent()
    return ask


class _Parent:
    """rank_parent.py, which forks all ranks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, ASSETS / "rank_parent.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def answer(
        self, do: str, preload: Sequence[str], environ: dict[str, str] | None, more: dict[str, Any]
    ) -> list[Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"do": do, "preload": list(preload), "environ": environ or {}, **more}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            found: list[Any] = json.loads(self._process.stdout.readline())
        except BaseException:  # of a test that took too long, say: the next one must not get its answer
            self.close()
            raise
        return found

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """With all of its ranks."""
        if not self.ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


_parents: list[_Parent] = []


def _parent() -> _Parent:
    """One a pytest process; another one when that had to be closed."""
    if not _parents or _parents[-1].ended:
        _parents.append(_Parent())
        atexit.register(_parents[-1].close)
    return _parents[-1]


def parent_pids() -> set[int]:
    """Of what stays when a test ends."""
    return {parent.pid for parent in _parents if not parent.ended}


def prepare(folder: Path, *overrides: str, base: dict[str, Any] = PARITY) -> Path:
    """A run directory with the resolved config that a launch would leave there."""
    folder.mkdir(parents=True)
    config = folder / "cfg.yaml"
    config.write_text(json.dumps(base))  # JSON is YAML
    resolved = load_config(config, list(overrides), run_dir=str(folder), name="case")
    (folder / "config.yaml").write_text(dump_resolved(resolved))
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """All of a step that must be the same bits after a resume."""
    return [(r["step"], r["loss"], r["grad_norm"], r.get("skipped"), r.get("loss_scale")) for r in metrics(folder)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "report-0.jsonl").read_text().splitlines()
    return [r["event"] for r in map(json.loads, lines) if r["type"] == "event" and r["event"]["type"] == kind]


def failures(folder: Path) -> list[dict[str, Any]]:
    """Those that ranks have reported, by rank: the first to fail may have been too quick for its peers to."""
    reports = sorted(folder.glob("report-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    records = (json.loads(line) for report in reports for line in report.read_text().splitlines())
    return [record for record in records if record["type"] == "failure"]


def failure(folder: Path) -> dict[str, Any]:
    """The first of them, of a rank that failed by itself where there is one."""
    return min(failures(folder), key=lambda record: bool(record["victim"]))


def worst_difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference of two curves of the same length."""
    assert len(found) == len(wanted)
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
