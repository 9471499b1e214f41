"""Runs through the command line, to be hurt and looked at: curve, events, agents, workers. CONFIG is one for them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from sessions import processes_of

from dtrain.cluster.rundir import Control, RunDir, look_again, read_json, read_jsonl
from dtrain.launcher.runs import resolve
from dtrain.launcher.state import read_status

ASSETS = Path(__file__).parent
DTRAIN = str(Path(sys.executable).parent / "dtrain")
STEPS = 40
Curve = list[tuple[int, float, float]]  # step, loss, gradient norm
CONFIG: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "dropout": 0.1},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "parity.Tokens", "noise": 0.1, "delay_s": 0.01}, "batch_size": 13},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": STEPS, "clip_grad_norm": 1.0},
    "checkpoint": {"every": 5},
    "cluster": {"nodes": 2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A run of a config file in a directory of its own, launched any number of times. `before`: words in front of
    dtrain, like those of mpirun; `options`: of every launch; `environ`: variables more."""

    run: RunDir
    config: Path
    command: str = "launch"
    before: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)

    def launch(self, *more: str) -> subprocess.Popen[bytes]:
        self.run.path.parent.mkdir(parents=True, exist_ok=True)  # of a URL: a folder of copies
        with open(self.run.path.with_suffix(".out"), "ab") as output:
            what = [self.command, str(self.config), "--run-dir", self.run.place, *self.options, *more]
            environ = {**os.environ, "PYTHONPATH": str(ASSETS), "OMP_NUM_THREADS": "1", **self.environ}
            return subprocess.Popen([*self.before, DTRAIN, *what], stdout=output, stderr=output, env=environ)

    def finish(self, *more: str) -> int:
        return self.wait(self.launch(*more))

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of a launch."""
        try:
            return process.wait(240)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"still running after 240 s\n{self.said}")

    @property
    def said(self) -> str:
        return self.run.path.with_suffix(".out").read_text()

    @property
    def control(self) -> Control:
        job = read_json(self.run.job)
        assert job is not None
        return self.run.control(str(job["job_id"]))

    def steps(self) -> int:
        """How many have been recorded."""
        return len(list(read_jsonl(self.run.metrics)))

    def curve(self) -> Curve:
        """Of a run that has ended: each step once, in order."""
        found = [(record["step"], record["loss"], record["grad_norm"]) for record in read_jsonl(self.run.metrics)]
        assert [step for step, _, _ in found] == list(range(1, len(found) + 1))
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run.events) if event["type"] == kind]

    def attempts(self) -> int:
        return len(self.events("attempt_started"))

    def agent(self, node: int) -> int:
        record = read_json(self.control.node(node))
        assert record is not None
        return int(record["pid"])

    def session(self, node: int) -> list[int]:
        """Every process of a simulated node: its agent's session."""
        return [process.pid for process in processes_of({self.agent(node)})]

    def worker(self, global_rank: int) -> int:
        def pids() -> list[int]:
            workers = read_status(resolve(self.run.place, Path.cwd())[0])["workers"]
            return [int(w["pid"]) for w in workers if w["global_rank"] == global_rank and w["pid"]]

        self.until(pids, f"the worker of rank {global_rank}")
        return pids()[0]

    def kill_everything(self, launching: subprocess.Popen[bytes]) -> None:
        """As when the machine loses power."""
        nodes = [read_json(self.control.node(node)) for node in range(2)] if read_json(self.run.job) else []
        launching.kill()
        for process in processes_of({int(node["pid"]) for node in nodes if node}):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launching.wait()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 120
        while True:
            look_again(self.run.path, 0.3)
            if condition():
                return
            if time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in sorted(self.run.path.glob("logs/**/*.log"))]
                pytest.fail("\n".join([f"{what}: not in time", self.said, *logs]))
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.steps() >= step, f"step {step}")
