"""A run on a real Slurm that is stopped again and again ends as if nothing had happened: the
same numbers bit for bit, every sample once, nobody's help."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counted
import pytest
from countedrun import BATCH, EVAL_EVERY, HANG_S, Run
from slurmcluster import SlurmCluster

from dtrain.cluster import exits
from dtrain.cluster.rundir import read_json

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

REFUSE = "refuse"  # a file in the run directory
EVERY = 8  # steps between two stops, as far as the run is then: a stop takes a moment to arrive
STEPS = 10 * (EVERY + 2 * counted.AHEAD)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm_cluster: SlurmCluster) -> list[tuple[Any, ...]]:
    """The numbers of STEPS steps on the local back end, at the same world size."""
    run = Run(slurm_cluster, tmp_path_factory.mktemp("undisturbed"), STEPS, dropout=0.1)
    run.launch("--backend", "local", "checkpoint.every=1000", step_s=0.0)
    return run.numbers()


@pytest.fixture
def run(tmp_path: Path, slurm: SlurmCluster) -> Callable[..., Run]:
    return lambda steps, **cluster: Run(slurm, tmp_path / "stopped", steps, dropout=0.1, **cluster)


def stop_by_signal(run: Run) -> None:
    (job,) = run.slurm.jobs()
    run.slurm.run("scancel", "--batch", "--signal=USR1", str(job))


def stop_by_step_signal(run: Run) -> None:
    """As `sbatch --signal=USR2@60` sends it: every process of the tasks gets it, the driver does not."""
    (job,) = run.slurm.jobs()
    run.slurm.run("scancel", "--signal=USR2", str(job))


def stop_where_no_requeue_is_allowed(run: Run) -> None:
    """As at a site with JobRequeue=0."""
    (job,) = run.slurm.jobs()
    run.slurm.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    stop_by_signal(run)


def stop_where_scontrol_refuses(run: Run) -> None:
    """Slurm may refuse a requeue at that very moment, for a reason that nothing told before."""
    (run.dir / REFUSE).touch()
    stop_by_signal(run)
    run.wait("the refusal", lambda: not (run.dir / REFUSE).exists())


def write_scontrol(run: Run, folder: Path) -> str:
    """A PATH with a stand-in that refuses one requeue where a file in the run directory says so."""
    folder.mkdir()
    refuse = shlex.quote(str(run.dir / REFUSE))
    (folder / "scontrol").write_text(
        f"""#!/bin/bash
if [ "$1" = requeue ] && rm {refuse} 2>/dev/null; then
  echo "Requested operation is presently disabled for job $2" >&2
  exit 1
fi
exec {shutil.which("scontrol")} "$@"
"""
    )
    (folder / "scontrol").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def stop_one_worker(run: Run) -> None:
    (found,) = (read_json(path) for path in run.dir.glob("control/*/status.json"))
    assert found is not None
    worker = found["workers"][-1]
    run.slurm.on(worker["host"], "kill", f"-{signal.SIGTERM:d}", str(worker["pid"]))


def preempt(run: Run) -> None:
    run.slurm.submit("-pmain", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 1")


def hold(run: Run, what: str) -> None:
    """Returns when a sample that does not come is waited for; stop_and_go_on lets it go."""
    (run.dir / f"hold-{what}").touch()
    run.wait(f"a wait for {what}", (run.dir / f"held-{what}").exists)


def stop_while_data_is_awaited(run: Run) -> None:
    hold(run, "Data")
    stop_by_step_signal(run)


def stop_while_evaluating(run: Run) -> None:
    hold(run, "Held")
    preempt(run)


def stop_while_restoring(run: Run) -> None:
    """Twice: the second one while the workers of the next start are made."""
    (run.dir / "hold-Model").touch()
    stop_by_signal(run)
    hold(run, "Model")
    stops = len(run.events("stopping"))
    stop_by_signal(run)
    run.wait("the second stop", lambda: len(run.events("stopping")) > stops)


def stop_and_go_on(run: Run, stop: Callable[[Run], None]) -> float:
    """Seconds from the stop to the next step."""
    starts = len(run.events("requeued"))
    stop(run)
    began = time.monotonic()
    run.wait("the restart", lambda: len(run.events("requeued")) > starts)
    for held in run.dir.glob("hold-*"):
        held.unlink()
    run.wait_step(run.step + 1)
    return round(time.monotonic() - began, 1)


@pytest.mark.parametrize(
    ("slurm_options", "stops"),
    [
        # Preempted, Slurm requeues the job; for the other stops a new job is submitted.
        (
            {"on_stop": "resubmit", "partition": "low"},
            [
                stop_by_signal,
                stop_by_step_signal,
                preempt,
                stop_one_worker,
                stop_by_signal,
                stop_while_data_is_awaited,
                stop_while_evaluating,
                stop_while_restoring,
                preempt,
            ],
        ),
        # Preempted, Slurm would cancel the job.
        (
            {"on_stop": "requeue", "partition": "lowcancel"},
            [preempt, stop_where_no_requeue_is_allowed, stop_where_scontrol_refuses],
        ),
    ],
    ids=["ten", "requeued"],
)
def test_stops_leave_no_trace(
    tmp_path: Path,
    run: Callable[..., Run],
    undisturbed: list[tuple[Any, ...]],
    slurm_options: dict[str, str],
    stops: list[Callable[[Run], None]],
) -> None:
    """One run, stopped again and again: no step is lost or done twice, and a follower sees it all."""
    stopped = run(STEPS, slurm=slurm_options)
    stopped.launch("--detach", step_s=0.2, PATH=write_scontrol(stopped, tmp_path / "bin"))
    follower = stopped.start("logs", "--follow", "--rank", "0", str(stopped.dir))
    print(f"\nfrom a stop to the next step ({slurm_options}):")
    for number, stop in enumerate(stops, start=1):
        stopped.wait_step(number * EVERY)
        print(f"  {stop.__name__}: {stop_and_go_on(stopped, stop)} s", flush=True)
    stopped.wait_done()
    assert stopped.samples() == list(range(STEPS * BATCH))
    assert stopped.numbers() == undisturbed
    assert {event["step"] for event in stopped.events("evaluated")} == set(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
    followed, _ = follower.communicate(timeout=HANG_S)
    assert follower.returncode == exits.DONE
    assert followed.count(counted.MADE) > len(stops)


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


def test_a_stop_during_setup_lines(tmp_path: Path, run: Callable[..., Run], undisturbed: list[tuple[Any, ...]]) -> None:
    """Before any Python of ours runs: the signal is kept, the job goes back and begins again."""
    # Setup lines are also run for the check of the targets, before there is a job.
    setup = f'if [ -n "$SLURM_JOB_ID" ]; then touch {tmp_path}/begun; sleep 3; fi'
    early = run(STEPS, setup=[setup], slurm={"on_stop": "resubmit"})
    early.launch("--detach", step_s=0.0)
    early.wait("the setup line", (tmp_path / "begun").exists)
    stop_by_signal(early)
    early.wait("the second start", lambda: bool(early.events("requeued")))
    early.wait_done()
    assert early.numbers() == undisturbed


def test_slurmctld_may_die_while_a_run_trains_and_ends(
    run: Callable[..., Run], undisturbed: list[tuple[Any, ...]]
) -> None:
    deaf = run(STEPS)
    deaf.launch("--detach", step_s=0.1)
    deaf.wait_step(10)
    (job,) = deaf.slurm.jobs()
    deaf.slurm.stop_controller(crash=True)
    asked = deaf.start("status", "--json", str(deaf.dir))
    said, _ = asked.communicate(timeout=HANG_S)
    assert json.loads(said)["state"] == "unknown"
    assert asked.returncode == exits.UNKNOWN
    deaf.wait_step(deaf.step + 20)
    deaf.wait_done()
    deaf.slurm.start_controller()
    deaf.slurm.wait_job(job, "COMPLETED")
    assert deaf.numbers() == undisturbed
    assert deaf.events("requeued") == []
