"""Whole runs of the real trainer through `dtrain launch`: killed, stopped, damaged, relaunched. The curve must be, bit
for bit, that of a run to which nothing happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.cluster.rundir import RunDir, read_json, read_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ASSETS = Path(__file__).parent / "assets"
DTRAIN = Path(sys.executable).parent / "dtrain"
STEPS = 100
CONFIG: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "dropout": 0.1},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "parity.Tokens", "noise": 0.1, "delay_s": 0.015}, "batch_size": 13},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": STEPS, "clip_grad_norm": 1.0},
    "checkpoint": {"every": 5},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run directory, launched any number of times."""

    run: RunDir
    config: Path
    options: tuple[str, ...]

    def launch(self, *more: str) -> subprocess.Popen[str]:
        command: list[str | Path] = [DTRAIN, "launch", "--run-dir", self.run.path, self.config, *self.options, *more]
        output = open(self.run.path.with_suffix(".out"), "a")  # noqa: SIM115  the process keeps it
        environment = {**os.environ, "PYTHONPATH": str(ASSETS)}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)

    @property
    def output(self) -> str:
        return self.run.path.with_suffix(".out").read_text()

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 300) -> int:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s\n{self.output}")

    def records(self) -> list[dict[str, Any]]:
        with contextlib.suppress(json.JSONDecodeError):
            return list(read_jsonl(self.run.metrics))
        return []

    def curve(self) -> list[tuple[float, float]]:
        records = self.records()
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [(record["loss"], record["grad_norm"]) for record in records]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run.events) if event["type"] == kind]

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.run.path.glob("logs/**/*.log")))
                pytest.fail(f"{what}: not within {timeout_s} s\n{self.output}\n{logs}")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        self.until(lambda: len(self.records()) >= step, f"step {step}")

    def attempt(self) -> int:
        return max(int(event["attempt"]) for event in self.events("attempt_started"))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(subprocess.check_output([DTRAIN, "status", "--json", self.run.path]))
        return found

    def agent(self, node: int) -> int:
        job = read_json(self.run.job)
        assert job is not None
        record = read_json(self.run.control(job["job_id"]).node(node))
        assert record is not None
        return int(record["pid"])

    def worker(self, global_rank: int) -> int:
        def known() -> list[dict[str, Any]]:
            return [w for w in self.status()["workers"] if w["global_rank"] == global_rank and w["pid"]]

        self.until(known, f"the worker of rank {global_rank}")
        return int(known()[0]["pid"])

    def session(self, node: int) -> list[int]:
        """Every process of a simulated node: its agent's session."""
        leader = self.agent(node)
        return [process.pid for process in psutil.process_iter() if _session_of(process.pid) == leader]


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """start(name, options...) -> Job; what is still going on at the end is cancelled."""
    jobs: list[Job] = []

    def make(name: str, *options: str) -> Job:
        config = tmp_path / "cfg.yaml"
        config.write_text(json.dumps(CONFIG))
        jobs.append(Job(run=RunDir(tmp_path / name), config=config, options=options))
        return jobs[-1]

    yield make
    for job in jobs:
        if job.run.job.exists():
            subprocess.run([DTRAIN, "cancel", job.run.path], stdout=subprocess.DEVNULL, timeout=60, check=False)


LAYOUTS = {
    "2 ranks on 2 nodes": (2, 1, "ddp"),
    "3 ranks on 3 nodes": (3, 1, "ddp"),
    "4 ranks on 2 nodes": (2, 2, "fsdp"),
}


def overrides(layout: tuple[int, int, str]) -> list[str]:
    nodes, procs, strategy = layout
    return [f"cluster.nodes={nodes}", f"cluster.procs_per_node={procs}", f"strategy={strategy}"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_whatever_dies_the_curve_is_that_of_an_uninterrupted_run(
    start: Callable[..., Job], layout: tuple[int, int, str]
) -> None:
    """One run through it all: a worker, a node, node 0, the launching process, SIGTERM, and a relaunch."""
    whole, hurt = start("whole"), start("hurt")
    more = overrides(layout)
    assert whole.finish(whole.launch(*more)) == 0
    assert len(whole.curve()) == STEPS

    process = hurt.launch(*more)
    hurt.until_step(6)
    os.kill(hurt.worker(1), signal.SIGKILL)
    hurt.until(lambda: hurt.attempt() == 2, "attempt 2 after the loss of a worker")
    assert hurt.events("failure")[-1]["global_rank"] == 1

    hurt.until_step(14)
    os.kill(hurt.agent(layout[0] - 1), signal.SIGKILL)
    hurt.until(lambda: hurt.attempt() == 3, "attempt 3 after the loss of the last node")
    assert hurt.events("node_lost")[-1]["node"] == layout[0] - 1

    hurt.until_step(22)
    os.kill(hurt.agent(0), signal.SIGKILL)
    hurt.until(lambda: hurt.attempt() == 4, "attempt 4 after the loss of node 0")

    hurt.until_step(30)
    process.kill()
    process.wait()
    hurt.until_step(34)  # the run goes on without the process that launched it
    assert hurt.status()["state"] == "running"

    assert hurt.finish(hurt.launch(*more)) == 2  # a second launch starts nothing while the first job is alive
    assert hurt.attempt() == 4

    os.kill(hurt.agent(0), signal.SIGTERM)
    hurt.until(lambda: hurt.events("ended"), "the stop after SIGTERM")
    ended = hurt.events("ended")[-1]
    assert (ended["state"], ended["exit_code"]) == ("stopped", 85)
    stopped_at = len(hurt.records())
    assert stopped_at < STEPS

    assert hurt.finish(hurt.launch(*more)) == 0
    assert hurt.events("attempt_started")[-1]["from"]["step"] == stopped_at  # nothing that was done is done again
    assert hurt.curve() == whole.curve()
    assert hurt.finish(hurt.launch(*more)) == 0  # it is done: says so, starts nothing
    assert hurt.attempt() == 5
    assert "done" in hurt.output.splitlines()[-1] or "done" in hurt.output[-600:]


def test_any_number_of_nodes_gives_the_losses_of_one_process(start: Callable[..., Job]) -> None:
    """The augmentation draws random numbers, but by sample and not by rank; a batch of 13 divides by none of them."""
    plain = ("train.steps=50", "model.dropout=0", "data.train.delay_s=0")
    one = start("one", *plain)
    assert one.finish(one.launch("strategy=single")) == 0
    wanted = [loss for loss, _ in one.curve()]
    for nodes in (1, 2, 3, 4):
        for strategy in ("ddp", "fsdp"):
            job = start(f"{strategy}-{nodes}", *plain)
            assert job.finish(job.launch("--nodes", str(nodes), f"strategy={strategy}")) == 0
            found = [loss for loss, _ in job.curve()]
            assert found == pytest.approx(wanted, rel=1e-6, abs=0), f"{strategy} on {nodes} nodes"
            assert job.events("attempt_started")[-1]["nodes"] == nodes


def test_ctrl_c_saves_and_the_relaunch_goes_on(start: Callable[..., Job]) -> None:
    job = start("run")
    process = job.launch("cluster.nodes=2", "train.steps=40")
    job.until_step(5)
    process.send_signal(signal.SIGINT)
    assert job.finish(process) == 85
    stopped_at = len(job.records())
    assert "dtrain launch" in job.output  # says how to go on
    assert job.finish(job.launch("cluster.nodes=2", "train.steps=40")) == 0
    assert job.events("resumed")[-1]["step"] == stopped_at
    assert len(job.curve()) == 40


def test_a_frozen_node_that_wakes_up_harms_nothing(start: Callable[..., Job]) -> None:
    """Node 1 stops as a whole (SIGSTOP), is replaced, and wakes up in the middle of the new attempt."""
    whole, job = start("whole"), start("run")
    more = ["cluster.nodes=2", "strategy=ddp"]
    assert whole.finish(whole.launch(*more)) == 0
    process = job.launch(*more)
    job.until_step(10)
    frozen = job.session(1)
    assert len(frozen) >= 3  # agent, warm parent, worker
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        job.until(lambda: job.attempt() == 2, "a new attempt without the frozen node")
        job.until(lambda: job.events("resumed"), "the new attempt's first step")
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert job.finish(process) == 0
    assert job.curve() == whole.curve()
    listed = json.loads(subprocess.check_output([DTRAIN, "ckpt", "ls", "--json", job.run.path]))
    boundary = job.events("resumed")[0]["step"]
    assert all(c["attempt"] == 2 for c in listed if c["live"] and c["step"] > boundary)
    job.until(lambda: not any(psutil.pid_exists(pid) for pid in frozen), "the end of the old node's processes")


def test_a_flipped_byte_is_named_and_passed_over(start: Callable[..., Job]) -> None:
    whole, job = start("whole"), start("run")
    more = ["cluster.nodes=2", "strategy=ddp"]
    assert whole.finish(whole.launch(*more)) == 0
    process = job.launch(*more)
    job.until_step(21)
    process.send_signal(signal.SIGINT)
    assert job.finish(process) == 85
    newest = max(job.run.path.glob("checkpoints/step-*"), key=lambda path: path.name)
    file = newest / "rank-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)

    verified = subprocess.run([DTRAIN, "ckpt", "verify", job.run.path], capture_output=True, text=True, check=False)
    assert verified.returncode == 1
    assert file.name in verified.stdout
    assert any(word in verified.stdout for word in ("model.", "optim."))  # the tensor

    assert job.finish(job.launch(*more)) == 0
    passed = job.events("checkpoint_passed_over")[-1]
    damaged = int(newest.name.split("-")[1])
    assert passed["step"] == damaged
    assert f"step {damaged}" in job.output
    assert job.events("resumed")[-1]["step"] < damaged
    assert job.curve() == whole.curve()
    verified = subprocess.run([DTRAIN, "ckpt", "verify", job.run.path], capture_output=True, text=True, check=False)
    assert verified.returncode == 0


def test_the_culprit_is_shown_not_its_victims(start: Callable[..., Job]) -> None:
    """Rank 2 of 3 raises: the same error twice at the same step is the user's bug, and ends the run with 93."""
    job = start("run")
    code = job.finish(job.launch("cluster.nodes=3", "model={_target_: faulty.FailsOnRank2}"))
    assert code == 93
    failure = read_json(job.run.failure)
    assert failure is not None
    assert failure["global_rank"] == 2
    assert failure["step"] == 5
    assert failure["phase"] == "forward"
    assert "ZeroDivisionError" in failure["message"]
    assert "faulty.py" in failure["where"]
    assert "faulty.py" in job.output
    assert "gloo" not in job.output  # what the victims saw
    assert job.attempt() == 2


def test_a_worker_that_leaves_without_a_word_is_the_culprit(start: Callable[..., Job]) -> None:
    """os._exit(0) in rank 1's fifth forward: an exit code of 0 does not make the run done."""
    job = start("run")
    assert job.finish(job.launch("cluster.nodes=2", "model={_target_: faulty.LeavesOnRank1}")) == 93
    failure = read_json(job.run.failure)
    assert failure is not None
    assert (failure["global_rank"], failure["step"], failure["kind"]) == (1, 5, "exit")
    assert job.status()["state"] == "failed"
    assert job.attempt() == 2


def test_a_run_whose_checkpoints_are_all_damaged_or_gone_does_not_begin_anew(start: Callable[..., Job]) -> None:
    job = start("run")
    process = job.launch("cluster.nodes=2")
    job.until_step(12)
    process.send_signal(signal.SIGINT)
    assert job.finish(process) == 85
    checkpoints = job.run.path / "checkpoints"
    for file in checkpoints.glob("step-*/rank-00000.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    before = sorted(checkpoints.glob("step-*"))
    assert len(before) == 3
    assert job.finish(job.launch("cluster.nodes=2")) == 93
    assert sorted(checkpoints.glob("step-*")) == before  # for somebody to look at
    assert "--fresh" in job.output

    checkpoints.rename(checkpoints.with_name("elsewhere"))  # a disk that is not mounted
    attempts = job.attempt()
    assert job.finish(job.launch("cluster.nodes=2")) == 2
    assert "holds no checkpoint" in job.output
    assert job.attempt() == attempts
