"""A counted training on a cluster's Slurm, to be stopped, or hit by lost nodes, and checked afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counted
import pytest
from slurmcluster import SlurmCluster

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl

ASSETS = Path(__file__).parent
HANG_S = 300.0
BATCH = 6
EVAL_EVERY = 10


class Run:
    """One run of a counted training in `folder`. Its end is that of its control directory."""

    def __init__(self, slurm: SlurmCluster, folder: Path, steps: int, /, dropout: float = 0.0, **cluster: Any) -> None:
        self.slurm = slurm
        self.steps = steps
        self.dir = folder / "run"
        self._folder = folder
        folder.mkdir(exist_ok=True)
        config = {
            "name": "counted",
            "run_dir": str(self.dir),
            "model": {"_target_": "counted.Model", "dropout": dropout},
            "loss": "counted.loss",
            "data": {
                "train": {"_target_": "counted.Data", "size": steps * BATCH}, "batch_size": BATCH, "workers": 1,
                "eval": {"_target_": "counted.Held", "size": 2 * BATCH},
            },
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
            "schedule": "cosine",
            "train": {"steps": steps, "seed": 3, "eval_every": EVAL_EVERY},
            "checkpoint": {"keep": 2, "every": 5},
            "cluster": {"backend": "slurm", "nodes": 2, **cluster},
        }  # fmt: skip
        (folder / "cfg.yaml").write_text(json.dumps(config))

    def launch(self, *options: str, step_s: float = 0.1, **more: str) -> None:
        """`more`: variables of its environment, which Slurm hands on to the job."""
        paths = os.pathsep.join([str(ASSETS), os.environ.get("PYTHONPATH", "")])
        environ = {
            **os.environ, **self.slurm.environ(), "TMPDIR": str(self.slurm.local_disk), "PYTHONPATH": paths,
            "COUNTED_STEP_S": str(step_s), "OMP_NUM_THREADS": "1", **more,
        }  # fmt: skip
        dtrain = [sys.executable, "-P", "-m", "dtrain.launcher.cli", "launch", "cfg.yaml", *options]
        subprocess.run(dtrain, cwd=self._folder, env=environ, check=True, timeout=HANG_S, stdout=subprocess.DEVNULL)

    def start(self, *words: str) -> subprocess.Popen[str]:
        dtrain = [sys.executable, "-P", "-m", "dtrain.launcher.cli", *words]
        return subprocess.Popen(dtrain, env={**os.environ, **self.slurm.environ()}, text=True, stdout=subprocess.PIPE)

    def wait(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_S
        while True:
            code = self.exit_code  # first: a run that ends now has reached what it was to reach
            if reached():
                return
            if time.monotonic() > deadline or code not in (None, exits.STOPPED):
                pytest.fail(f"exit code {code} before {what}\n{self.words()}")
            time.sleep(0.1)

    def wait_done(self) -> None:
        (self.dir / counted.HURRY).touch()
        self.wait("the end", lambda: self.exit_code == exits.DONE)

    def wait_step(self, step: int) -> None:
        """The run goes on from there, but not far: until the next step is waited for, or the end."""
        counted.allow(self.dir, max(step, self.step) + counted.AHEAD)
        self.wait(f"step {step}", lambda: self.step >= step)

    @property
    def exit_code(self) -> int | None:
        """Of its last word; a run that goes on after a stop has that put aside."""
        found = [read_json(path) for path in self.dir.glob("control/*/ended.json")]
        return int(found[0]["exit_code"]) if found and found[0] else None

    @property
    def step(self) -> int:
        records = list(read_jsonl(RunDir(self.dir).metrics))
        return int(records[-1]["step"]) if records else 0

    def numbers(self) -> list[tuple[Any, ...]]:
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_jsonl(RunDir(self.dir).metrics)]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(RunDir(self.dir).events) if event["type"] == kind]

    def samples(self) -> list[int]:
        """Those that were trained on, in all starts of the run together."""
        texts = [path.read_text() for path in self.dir.glob("samples-*.jsonl")]
        return sorted(number for text in texts for line in text.splitlines() for number in json.loads(line))

    def words(self) -> str:
        logs = [path for path in self.dir.glob("logs/*") if path.is_file()]
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(logs))
