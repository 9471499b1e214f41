"""Whole runs of every layout that lose a worker, then everything, and are launched again: curve and final state are,
bit for bit, those of a run to which nothing happened. ddp and fsdp go through more in test_recovery.py."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cases import PARITY, Run, needs, numbers, prepare, rank_runner
from launched import Launched
from savedstate import digest

from dtrain.cluster.rundir import RunDir

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS, EVERY = 18, 3
SMALL = {"vocab": 96, "seq": 8}
BASE: dict[str, Any] = {
    **PARITY,
    "model": {"_target_": "parity.Transformer", "width": 32, "layers": 4, "dropout": 0.1, **SMALL},
    "data": {"train": {"_target_": "parity.Tokens", "noise": 0.1, "delay_s": 0.012, **SMALL}, "batch_size": 13},
    "schedule": {"name": "cosine", "warmup": 2},
    "train": {"steps": STEPS, "clip_grad_norm": 0.5, "micro_batch": 4},
    "checkpoint": {"every": EVERY},
}
LAYOUTS = {  # nodes x processes
    "hsdp": ("{name: fsdp, replicate: 2}", 1, 4),
    "zero1": ("zero1", 1, 2),
    "zero2, offload": ("{name: zero2, offload: cpu}", 1, 2),
    "zero3": ("zero3", 1, 2),
    "horovod": ("horovod", 2, 2),
    "tensor": ("{name: ddp, tensor: 2}", 1, 2),
    "fsdp x tensor": ("{name: fsdp, tensor: 2, sequence_parallel: true}", 1, 4),
    "pipeline": ("{name: ddp, pipeline: 2, pipeline_schedule: interleaved}", 1, 2),
    "fsdp x pipeline": ("{name: fsdp, pipeline: 2}", 2, 2),
}
NEEDED = {"zero": "deepspeed", "horovod": "horovod"}


@pytest.fixture(scope="module")
def run() -> Run:
    preload = ["deepspeed"] if find_spec("deepspeed") else []
    return rank_runner({"DS_ACCELERATOR": "cpu"}, preload=preload)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_launched_again_it_is_the_same_run(run: Run, tmp_path: Path, layout: str) -> None:
    for start, package in NEEDED.items():
        if layout.startswith(start):
            needs(package, f"needs {package}: docs/strategies.md says how it is installed")
    strategy, nodes, procs = LAYOUTS[layout]
    size = nodes * procs
    overrides = [f"strategy={strategy}", f"cluster.nodes={nodes}", f"cluster.procs_per_node={procs}"]
    unhurt = prepare(tmp_path / "unhurt", *overrides, "data.train.delay_s=0", base=BASE)
    assert run(unhurt, size) == [0] * size

    config = tmp_path / "cfg.yaml"
    config.write_text(json.dumps(BASE))
    folder = RunDir(tmp_path / "hurt")
    hurt = Launched(run=folder, config=config, options=tuple(overrides))
    process = hurt.launch()
    try:
        hurt.until_step(EVERY + 2)
        os.kill(hurt.worker(size - 1), signal.SIGKILL)
        hurt.until(lambda: hurt.attempts() == 2, "attempt 2 after the loss of a worker")
        hurt.until_step(3 * EVERY + 1)
    finally:
        hurt.kill_everything(process)
    assert hurt.steps() < STEPS
    process = hurt.launch()
    try:
        assert hurt.wait(process) == 0, hurt.said
    finally:
        if process.poll() != 0:  # else its agent is tidying up
            hurt.kill_everything(process)

    assert hurt.attempts() == 3
    assert numbers(folder.path) == numbers(unhurt)
    assert digest(folder.path, STEPS) == digest(unhurt, STEPS)
