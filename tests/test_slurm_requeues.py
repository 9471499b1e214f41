"""A run on a real Slurm that is stopped again and again, and that loses nodes, ends as if nothing had happened: the
same numbers bit for bit, every sample once, nobody's help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl

sys.path.insert(0, str(Path(__file__).parent / "assets"))

from slurmcluster import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

ASSETS = Path(__file__).parent / "assets"
HANG_S = 300.0
BATCH = 6
EVERY = 8  # steps between two stops, as far as the run is then: a stop takes a moment to arrive
STEPS = 10 * EVERY + 80


class Run:
    """One run of a counted training in `folder`. Its end is that of its control directory."""

    def __init__(self, slurm: SlurmCluster, folder: Path, steps: int, /, **cluster: Any) -> None:
        self.slurm = slurm
        self.steps = steps
        self.dir = folder / "run"
        self._folder = folder
        folder.mkdir(exist_ok=True)
        config = {
            "name": "counted",
            "run_dir": str(self.dir),
            "model": {"_target_": "counted.Model"},
            "loss": "counted.loss",
            "data": {"train": {"_target_": "counted.Data", "size": steps * BATCH}, "batch_size": BATCH, "workers": 0},
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
            "train": {"steps": steps, "seed": 3},
            "checkpoint": {"keep": 2, "every": 5},
            "cluster": {"backend": "slurm", "nodes": 2, **cluster},
        }
        (folder / "cfg.yaml").write_text(json.dumps(config))

    def launch(self, *options: str, step_s: float = 0.1) -> None:
        paths = os.pathsep.join([str(ASSETS), os.environ.get("PYTHONPATH", "")])
        environ = {
            **os.environ, **self.slurm.environ(), "COUNTED_STEP_S": str(step_s), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
        }  # fmt: skip
        dtrain = [sys.executable, "-P", "-m", "dtrain.launcher.cli", "launch", "cfg.yaml", *options]
        subprocess.run(dtrain, cwd=self._folder, env=environ, check=True, timeout=HANG_S, stdout=subprocess.DEVNULL)

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
        self.wait("the end", lambda: self.exit_code == exits.DONE)

    def wait_step(self, step: int) -> None:
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm_cluster: SlurmCluster) -> list[tuple[Any, ...]]:
    """The numbers of STEPS steps on the local back end, at the same world size."""
    run = Run(slurm_cluster, tmp_path_factory.mktemp("undisturbed"), STEPS)
    run.launch("--backend", "local", step_s=0.0)
    return run.numbers()


@pytest.fixture
def run(tmp_path: Path, slurm: SlurmCluster) -> Callable[..., Run]:
    return lambda steps, **cluster: Run(slurm, tmp_path / "stopped", steps, **cluster)


def stop_by_signal(run: Run) -> None:
    (job,) = run.slurm.jobs()
    run.slurm.run("scancel", "--batch", "--signal=USR1", str(job))


def stop_by_step_signal(run: Run) -> None:
    """As `sbatch --signal=USR2@60` sends it: every process of the tasks gets it, the driver does not."""
    (job,) = run.slurm.jobs()
    run.slurm.run("scancel", "--signal=USR2", str(job))


def stop_one_worker(run: Run) -> None:
    (found,) = (read_json(path) for path in run.dir.glob("control/*/status.json"))
    assert found is not None
    worker = found["workers"][-1]
    run.slurm.on(worker["host"], "kill", f"-{signal.SIGTERM:d}", str(worker["pid"]))


def preempt(run: Run) -> None:
    run.slurm.submit("-pmain", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 1")


def stop_and_go_on(run: Run, stop: Callable[[Run], None]) -> float:
    """Seconds from the stop to the next step."""
    starts = len(run.events("requeued"))
    stop(run)
    began = time.monotonic()
    run.wait("the restart", lambda: len(run.events("requeued")) > starts)
    before = run.step
    run.wait("the next step", lambda: run.step > before)
    return round(time.monotonic() - began, 1)


@pytest.mark.parametrize(
    ("slurm_options", "stops"),
    [
        # Preempted, Slurm requeues the job; for the other stops a new job is submitted.
        (
            {"on_stop": "resubmit", "partition": "low"},
            [stop_by_signal, stop_by_step_signal, preempt, stop_one_worker, stop_by_signal] * 2,
        ),
        ({"on_stop": "requeue", "partition": "lowgrace"}, [stop_by_signal, preempt]),
    ],
    ids=["ten", "requeued"],
)
def test_stops_leave_no_trace(
    run: Callable[..., Run],
    undisturbed: list[tuple[Any, ...]],
    slurm_options: dict[str, str],
    stops: list[Callable[[Run], None]],
) -> None:
    """One run, stopped again and again: no step is lost or done twice."""
    stopped = run(STEPS, slurm=slurm_options)
    stopped.launch("--detach", step_s=0.2)
    print(f"\nfrom a stop to the next step ({slurm_options}):")
    for number, stop in enumerate(stops, start=1):
        stopped.wait_step(number * EVERY)
        print(f"  {stop.__name__}: {stop_and_go_on(stopped, stop)} s", flush=True)
    stopped.wait_done()
    assert stopped.samples() == list(range(STEPS * BATCH))
    assert stopped.numbers() == undisturbed


def test_scancel_is_no_stop(run: Callable[..., Run], slurm: SlurmCluster) -> None:
    cancelled = run(400)
    cancelled.launch("--detach")
    cancelled.wait_step(3)
    (job,) = slurm.jobs()
    slurm.run("scancel", str(job))
    assert slurm.wait_job(job, "CANCELLED")["Restarts"] == "0"
    (event,) = cancelled.events("slurm_end")
    assert event["action"] == "finish"
    assert "scancel" in event["reason"]


def test_a_stop_during_setup_lines(run: Callable[..., Run], undisturbed: list[tuple[Any, ...]]) -> None:
    """Before any Python of ours runs: the signal is kept, the job goes back and begins again."""
    early = run(STEPS, setup=["sleep 5"], slurm={"on_stop": "resubmit"})
    early.launch("--detach", step_s=0.0)
    (job,) = early.slurm.jobs()
    early.slurm.wait_job(job, "RUNNING")
    time.sleep(2)  # a job is RUNNING up to a second before its script begins
    stop_by_signal(early)
    early.wait("the second start", lambda: bool(early.events("requeued")))
    early.wait_done()
    assert early.numbers() == undisturbed


def test_slurmctld_may_die_while_a_run_trains(run: Callable[..., Run], undisturbed: list[tuple[Any, ...]]) -> None:
    deaf = run(STEPS)
    deaf.launch("--detach", step_s=0.1)
    deaf.wait_step(10)
    deaf.slurm.stop_controller(crash=True)
    status = [sys.executable, "-P", "-m", "dtrain.launcher.cli", "status", str(deaf.dir), "--json"]
    environ = {**os.environ, **deaf.slurm.environ()}
    asked = subprocess.run(status, env=environ, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert json.loads(asked.stdout)["state"] == "unknown"
    assert asked.returncode == exits.UNKNOWN
    deaf.wait_step(deaf.step + 20)
    deaf.slurm.start_controller()
    deaf.wait_done()
    assert deaf.numbers() == undisturbed
    assert deaf.events("requeued") == []


@pytest.mark.parametrize("lost", ["node1", "node2"], ids=["batch-host", "other"])
def test_a_lost_node_is_done_without(run: Callable[..., Run], slurm: SlurmCluster, lost: str) -> None:
    """Either Slurm is faster, or the run is; it ends right in both cases."""
    hit = run(60)
    hit.launch("--detach")
    hit.wait_step(12)
    slurm.kill_node(lost)
    began, before = time.monotonic(), hit.step
    slurm.wait_state(lost, "down", "down*")
    noticed_s = time.monotonic() - began
    hit.wait("the next step", lambda: hit.step > before + 2)
    print(f"\nfrom kill to next step {time.monotonic() - began:.1f} s; Slurm knew of it after {noticed_s:.1f} s")
    hit.wait_done()
    assert [number for number, *_ in hit.numbers()] == list(range(1, 61))
