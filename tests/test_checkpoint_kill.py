"""kill -9 at random moments of a saving process: the newest live checkpoint always verifies and loads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint.attempts import live_checkpoints, newest_live
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.strategies.boxes import whole

NUM_KILLS = 6
SHAPE = (600, 1000)  # 2.4 MB

# Saves in a loop as two ranks, keeping two steps: every element of a step's tensor is the step's number.
SAVER = """
import sys, torch
from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint.attempts import claim_attempt
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.strategies.boxes import TensorSpec, replicated, whole

torch.set_num_threads(1)
store, board, shape = FileStorage(sys.argv[1]), LocalBoard(), (600, 1000)
specs = [TensorSpec(name="model.w", dtype="F32", shape=shape, layout=replicated(2, 2))]
attempt = claim_attempt(store, host="h", job_id="j")
ranks = [
    Checkpointer(store, attempt=attempt.number, rank=rank, world_size=2, strategy={"name": "ddp"}, board=board,
                 on_commit=lambda done: print(done.step, flush=True), keep=2)
    for rank in range(2)
]
tensor, step = torch.empty(shape), attempt.from_step
while True:
    step += 1
    tensor.fill_(float(step))
    for rank in ranks:
        rank.save(step, specs, {"model.w": [(whole(shape), tensor)]}, {"step": step})
"""


@pytest.mark.e2e
def test_the_newest_checkpoint_survives_kill_9(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, store = random.Random(seed), FileStorage(str(tmp_path / "store"))
    script = tmp_path / "saver.py"
    script.write_text(SAVER)
    reached = 0
    for _ in range(NUM_KILLS):
        committed = _run_and_kill(script, store, rng)
        newest = newest_live(live_checkpoints(store))
        assert newest is not None
        # What was reported as committed is there, and nothing that an attempt before had is lost.
        assert newest.step >= max(committed)
        assert min(committed) == reached + 1
        reached = newest.step
        assert verify_checkpoint(store, newest) == []
        manifest, target = read_manifest(store, newest.step, newest.attempt), torch.zeros(SHAPE)
        load_tensors(store, manifest, [("model.w", whole(SHAPE), target)])
        assert torch.equal(target, torch.full(SHAPE, float(newest.step)))
        assert manifest.state == {"step": newest.step}


def _run_and_kill(script: Path, store: FileStorage, rng: random.Random) -> list[int]:
    """The steps that the process had reported when it was killed, at a random moment after its first commit."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, str(store.root)], stdout=subprocess.PIPE, text=True, env=environ
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.random() * 0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=90)
    assert first, "the saver died by itself"
    return [int(line) for line in [first, *rest.split("\n")[:-1]]]
