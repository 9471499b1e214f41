"""Whole runs of the real trainer through `dtrain launch`: killed, stopped, damaged, relaunched. The curve must be, bit
for bit, that of a run to which nothing happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import DTRAIN, Curve, Launched

from dtrain.cluster.rundir import RunDir, read_json

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 100
CONFIG: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "dropout": 0.1},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "parity.Tokens", "noise": 0.1, "delay_s": 0.015}, "batch_size": 13},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": STEPS, "clip_grad_norm": 1.0},
    "checkpoint": {"every": 5},
}


def status(job: Launched) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subprocess.check_output([DTRAIN, "status", "--json", job.run.path]))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """start(name, options...) -> Launched; what is still going on at the end is cancelled."""
    jobs: list[Launched] = []

    def make(name: str, *options: str) -> Launched:
        config = tmp_path / "cfg.yaml"
        config.write_text(json.dumps(CONFIG))
        jobs.append(Launched(run=RunDir(tmp_path / name), config=config, options=options))
        return jobs[-1]

    yield make
    for job in jobs:
        if job.run.job.exists():
            subprocess.run([DTRAIN, "cancel", job.run.path], stdout=subprocess.DEVNULL, timeout=60, check=False)


TWO = (2, 1, "ddp")  # nodes, processes a node, strategy
LAYOUTS = {"3 ranks on 3 nodes": (3, 1, "ddp"), "4 ranks on 2 nodes": (2, 2, "fsdp")}


def overrides(layout: tuple[int, int, str]) -> list[str]:
    nodes, procs, strategy = layout
    return [f"cluster.nodes={nodes}", f"cluster.procs_per_node={procs}", f"strategy={strategy}"]


@pytest.fixture(scope="module")
def known() -> dict[tuple[int, int, str], Curve]:
    """By layout, of the runs that nothing has happened to."""
    return {}


@pytest.fixture
def undisturbed(
    start: Callable[..., Launched], known: dict[tuple[int, int, str], Curve]
) -> Callable[[tuple[int, int, str]], Curve]:
    def curve(layout: tuple[int, int, str]) -> Curve:
        if layout not in known:
            whole = start("whole")
            assert whole.finish(*overrides(layout), "data.train.delay_s=0") == 0
            known[layout] = whole.curve()
            assert len(known[layout]) == STEPS
        return known[layout]

    return curve


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_whatever_dies_the_curve_is_that_of_an_uninterrupted_run(
    start: Callable[..., Launched], undisturbed: Callable[[tuple[int, int, str]], Curve], layout: tuple[int, int, str]
) -> None:
    """One run through it all: a worker, a node, node 0, the launching process, SIGTERM, and a relaunch."""
    hurt, more = start("hurt"), overrides(layout)
    process = hurt.launch(*more)
    hurt.until_step(6)
    os.kill(hurt.worker(1), signal.SIGKILL)
    hurt.until(lambda: hurt.attempts() == 2, "attempt 2 after the loss of a worker")
    assert hurt.events("failure")[-1]["global_rank"] == 1

    hurt.until_step(14)
    os.kill(hurt.agent(layout[0] - 1), signal.SIGKILL)
    hurt.until(lambda: hurt.attempts() == 3, "attempt 3 after the loss of the last node")
    assert hurt.events("node_lost")[-1]["node"] == layout[0] - 1

    hurt.until_step(22)
    os.kill(hurt.agent(0), signal.SIGKILL)
    hurt.until(lambda: hurt.attempts() == 4, "attempt 4 after the loss of node 0")

    hurt.until_step(30)
    process.kill()
    process.wait()
    hurt.until_step(34)  # the run goes on without the process that launched it
    assert status(hurt)["state"] == "running"

    assert hurt.finish(*more) == 2  # a second launch starts nothing while the first job is alive
    assert hurt.attempts() == 4

    os.kill(hurt.agent(0), signal.SIGTERM)
    hurt.until(lambda: hurt.events("ended"), "the stop after SIGTERM")
    ended = hurt.events("ended")[-1]
    assert (ended["state"], ended["exit_code"]) == ("stopped", 85)
    stopped_at = hurt.steps()
    assert stopped_at < STEPS

    assert hurt.finish(*more) == 0
    assert hurt.events("attempt_started")[-1]["from"]["step"] == stopped_at  # nothing that was done is done again
    assert hurt.curve() == undisturbed(layout)
    assert hurt.finish(*more) == 0  # it is done: says so, starts nothing
    assert hurt.attempts() == 5
    assert "done" in hurt.said.splitlines()[-1] or "done" in hurt.said[-600:]


def test_any_number_of_nodes_gives_the_losses_of_one_process(start: Callable[..., Launched]) -> None:
    """The augmentation draws random numbers, but by sample and not by rank; a batch of 13 divides by none of them."""
    plain = ("train.steps=50", "model.dropout=0", "data.train.delay_s=0")
    one = start("one", *plain)
    assert one.finish("strategy=single") == 0
    wanted = [loss for _, loss, _ in one.curve()]
    for nodes, strategy in ((2, "fsdp"), (3, "ddp"), (4, "fsdp")):  # every number of ranks: test_worker.py
        job = start(f"{strategy}-{nodes}", *plain)
        assert job.finish("--nodes", str(nodes), f"strategy={strategy}") == 0
        found = [loss for _, loss, _ in job.curve()]
        assert found == pytest.approx(wanted, rel=1e-6, abs=0), f"{strategy} on {nodes} nodes"
        assert job.events("attempt_started")[-1]["nodes"] == nodes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_the_relaunch_goes_on(start: Callable[..., Launched], number: signal.Signals) -> None:
    """Ctrl-C, or what `timeout` and a machine that goes down send."""
    job = start("run")
    process = job.launch("cluster.nodes=2", "train.steps=40")
    job.until_step(5)
    process.send_signal(number)
    assert job.wait(process) == 85
    stopped_at = job.steps()
    assert "dtrain launch" in job.said  # says how to go on
    assert job.finish("cluster.nodes=2", "train.steps=40") == 0
    assert job.events("resumed")[-1]["step"] == stopped_at
    assert len(job.curve()) == 40


def test_a_frozen_node_that_wakes_up_harms_nothing(
    start: Callable[..., Launched], undisturbed: Callable[[tuple[int, int, str]], Curve]
) -> None:
    """Node 1 stops as a whole (SIGSTOP), is replaced, and wakes up in the middle of the new attempt."""
    job, more = start("run"), overrides(TWO)
    process = job.launch(*more)
    job.until_step(10)
    frozen = job.session(1)
    assert len(frozen) >= 3  # agent, warm parent, worker
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        job.until(lambda: job.attempts() == 2, "a new attempt without the frozen node")
        job.until(lambda: job.events("resumed"), "the new attempt's first step")
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert job.wait(process) == 0
    assert job.curve() == undisturbed(TWO)
    listed = json.loads(subprocess.check_output([DTRAIN, "ckpt", "ls", "--json", job.run.path]))
    boundary = job.events("resumed")[0]["step"]
    assert all(c["attempt"] == 2 for c in listed if c["live"] and c["step"] > boundary)
    job.until(lambda: not any(psutil.pid_exists(pid) for pid in frozen), "the end of the old node's processes")


def test_a_flipped_byte_is_named_and_passed_over(
    start: Callable[..., Launched], undisturbed: Callable[[tuple[int, int, str]], Curve]
) -> None:
    job, more = start("run"), overrides(TWO)
    process = job.launch(*more)
    job.until_step(21)
    process.send_signal(signal.SIGINT)
    assert job.wait(process) == 85
    newest = max(job.run.path.glob("checkpoints/step-*"), key=lambda path: path.name)
    file = newest / "rank-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)

    verified = subprocess.run([DTRAIN, "ckpt", "verify", job.run.path], capture_output=True, text=True, check=False)
    assert verified.returncode == 1
    assert file.name in verified.stdout
    assert any(word in verified.stdout for word in ("model.", "optim."))  # the tensor

    assert job.finish(*more) == 0
    passed = job.events("checkpoint_passed_over")[-1]
    damaged = int(newest.name.split("-")[1])
    assert passed["step"] == damaged
    assert f"step {damaged}" in job.said
    assert job.events("resumed")[-1]["step"] < damaged
    assert job.curve() == undisturbed(TWO)
    verified = subprocess.run([DTRAIN, "ckpt", "verify", job.run.path], capture_output=True, text=True, check=False)
    assert verified.returncode == 0


def test_the_culprit_is_shown_not_its_victims(start: Callable[..., Launched]) -> None:
    """Rank 2 of 3 raises: the same error twice at the same step is the user's bug, and ends the run with 93."""
    job = start("run")
    code = job.finish("cluster.nodes=3", "model={_target_: faulty.FailsOnRank2}")
    assert code == 93
    failure = read_json(job.run.failure)
    assert failure is not None
    assert failure["global_rank"] == 2
    assert failure["step"] == 5
    assert failure["phase"] == "forward"
    assert "ZeroDivisionError" in failure["message"]
    assert "faulty.py" in failure["where"]
    assert "faulty.py" in job.said
    assert "gloo" not in job.said  # what the victims saw
    assert job.attempts() == 2


def test_a_worker_that_leaves_without_a_word_is_the_culprit(start: Callable[..., Launched]) -> None:
    """os._exit(0) in rank 1's fifth forward: an exit code of 0 does not make the run done."""
    job = start("run")
    assert job.finish("cluster.nodes=2", "model={_target_: faulty.LeavesOnRank1}") == 93
    failure = read_json(job.run.failure)
    assert failure is not None
    assert (failure["global_rank"], failure["step"], failure["kind"]) == (1, 5, "exit")
    assert status(job)["state"] == "failed"
    assert job.attempts() == 2


def test_a_run_whose_checkpoints_are_all_damaged_or_gone_does_not_begin_anew(start: Callable[..., Launched]) -> None:
    job = start("run")
    process = job.launch("cluster.nodes=2")
    job.until_step(12)
    process.send_signal(signal.SIGINT)
    assert job.wait(process) == 85
    checkpoints = job.run.path / "checkpoints"
    for file in checkpoints.glob("step-*/rank-00000.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    before = sorted(checkpoints.glob("step-*"))
    assert len(before) == 3
    assert job.finish("cluster.nodes=2") == 93
    assert sorted(checkpoints.glob("step-*")) == before  # for somebody to look at
    assert "--fresh" in job.said

    checkpoints.rename(checkpoints.with_name("elsewhere"))  # a disk that is not mounted
    attempts = job.attempts()
    assert job.finish("cluster.nodes=2") == 2
    assert "holds no checkpoint" in job.said
    assert job.attempts() == attempts
