"""Start and recovery: dtrain against torchrun to the first finished step; from a kill to the next step.

    python benchmarks/startup.py [--rounds N]

Both sides train the demo's GPT with 4 ranks on one node, in turn: `dtrain launch` (config checked, targets checked,
agent, warm workers) and `torchrun` with an equivalent hand-written DDP script. Then one worker of dtrain's run gets a
SIGKILL, and the time until a step is finished that was not finished before is taken, replayed steps included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RANKS = 4
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BIN = Path(sys.executable).parent

CONFIG = """
model: {_target_: gpt.GPT, context: 64}
loss: gpt.loss
data: {train: {_target_: gpt.SourceText, context: 64}, batch_size: 32}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-3}
train: {steps: 100000, clip_grad_norm: 1.0}
strategy: ddp
checkpoint: {every: 5}
"""

SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
import gpt

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(gpt.GPT(context=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = gpt.SourceText(context=64)
for batch in DataLoader(data, batch_size=8, sampler=DistributedSampler(data)):
    optimizer.zero_grad()
    loss = gpt.loss(model(batch[0]), batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    dist.barrier()
    open(sys.argv[1], "w").write("step 1 is done")
    break
dist.destroy_process_group()
"""


def wait_for(ready: Callable[[], object], process: subprocess.Popen[bytes], limit_s: float = 120.0) -> float:
    """Seconds until `ready()` is true."""
    began = time.perf_counter()
    while not ready():
        if time.perf_counter() - began > limit_s:
            raise TimeoutError(f"not ready after {limit_s} s")
        if process.poll() not in (None, 0):
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        time.sleep(0.005)
    return time.perf_counter() - began


def torchrun(folder: Path) -> float:
    """Seconds from the command to the first finished step."""
    (folder / "train.py").write_text(SCRIPT)
    mark = folder / "done"
    command: list[str | Path] = [
        BIN / "torchrun",
        "--standalone",
        f"--nproc-per-node={RANKS}",
        folder / "train.py",
        mark,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seconds = wait_for(mark.exists, process)
        process.wait(60)
    return seconds


def records(run_dir: Path) -> list[dict[str, int]]:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def dtrain(folder: Path) -> tuple[float, float]:
    """(seconds from the command to the first finished step, seconds from a worker's kill to the next new step)."""
    (folder / "bench.yaml").write_text(CONFIG)
    run_dir = folder / "run"
    command: list[str | Path] = [
        BIN / "dtrain",
        "launch",
        "--run-dir",
        run_dir,
        folder / "bench.yaml",
        f"cluster.procs_per_node={RANKS}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        started = wait_for(lambda: records(run_dir), process)
        wait_for(lambda: len(records(run_dir)) >= 12, process)
        status = json.loads(subprocess.check_output([BIN / "dtrain", "status", "--json", run_dir]))
        victim = status["workers"][1]["pid"]
        before = len(records(run_dir))
        os.kill(victim, signal.SIGKILL)
        recovered = wait_for(lambda: any(r["attempt"] > 1 and r["step"] > before for r in records(run_dir)), process)
        subprocess.run([BIN / "dtrain", "cancel", run_dir], check=True, stdout=subprocess.DEVNULL)
        process.wait(60)
    return started, recovered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    theirs, ours, recoveries = [], [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            theirs.append(torchrun(Path(folder)))
            started, recovered = dtrain(Path(folder))
        ours.append(started)
        recoveries.append(recovered)
        print(
            f"round {number + 1}: torchrun {theirs[-1]:.2f} s, dtrain launch {started:.2f} s, "
            f"kill to next new step {recovered:.2f} s",
            flush=True,
        )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"first step: torchrun median {statistics.median(theirs):.2f} s, dtrain {statistics.median(ours):.2f} s")
    print(f"ratio: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")
    print(f"kill to the next new step: median {statistics.median(recoveries):.2f} s, worst {max(recoveries):.2f} s")


if __name__ == "__main__":
    main()
