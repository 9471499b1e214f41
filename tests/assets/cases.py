"""The parity case as run directories, and real workers over them without agents: what tests of layouts and precisions
share. The workers are rank_runner.py's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def rank_runner(environ: dict[str, str] | None = None, *, preload: Sequence[str] = ()) -> Iterator[Run]:
    """run(run_dir, world_size, ...) -> exit codes; one process, which imports torch and `preload` once."""
    with _answering("rank_runner.py", preload, environ) as answer:

        def run_case(run_dir: Path, world_size: int, **more: Any) -> list[int]:
            return answer({"run_dir": str(run_dir), "world_size": world_size, **more})

        yield run_case


@contextlib.contextmanager
def rank_functions(environ: dict[str, str] | None = None, *, module: str = "") -> Iterator[Ask]:
    """ask("module.function", world_size, ...): what it returns on each rank; one process, which imports torch once.
    With `module` its functions are asked for by their names alone."""
    with _answering("rank_functions.py", (), environ) as answer:

        def ask(call: str, world_size: int, **kwargs: Any) -> list[Any]:
            return answer({"call": f"{module}.{call}" if module else call, "world_size": world_size, "kwargs": kwargs})

        yield ask


@contextlib.contextmanager
def _answering(
    script: str, arguments: Sequence[str], environ: dict[str, str] | None
) -> Iterator[Callable[[dict[str, Any]], list[Any]]]:
    """One of the two scripts beside this file: a line of JSON for a line of JSON."""
    with subprocess.Popen(
        [sys.executable, ASSETS / script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def answer(request: dict[str, Any]) -> list[Any]:
            print(json.dumps(request), file=requests, flush=True)
            found: list[Any] = json.loads(answers.readline())
            return found

        yield answer
        requests.close()
        process.wait(30)


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


def failure(folder: Path, rank: int = 0) -> dict[str, Any]:
    lines = (folder / f"report-{rank}.jsonl").read_text().splitlines()
    (found,) = (r for r in map(json.loads, lines) if r["type"] == "failure")
    assert isinstance(found, dict)
    return found


def worst_difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference of two curves of the same length."""
    assert len(found) == len(wanted)
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
