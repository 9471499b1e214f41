"""Back end `slurm`: a job submitted with sbatch, whose script becomes `dtrain launch --batch` on its first node."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

from dtrain.cluster.backends import Loss
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import Control, RunDir, write_once
from dtrain.cluster.zygote import Zygote
from dtrain.slurm import node, owner, submission
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.limits import over_limits, parse_partitions
from dtrain.slurm.node import NodeSide
from dtrain.slurm.options import submit_options
from dtrain.slurm.records import JobRecord
from dtrain.slurm.script import batch_command, render_script
from dtrain.slurm.standing import standing

# What the driver takes for the wish to save and end; the batch script is its process. With --full srun would end all.
_STOP = ("--signal=TERM", "--batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBackend(NodeSide):
    agent_args: tuple[str, ...] = ()

    @property
    def detaches(self) -> bool:
        return True

    def render(self, plan: JobPlan) -> str:
        return render_script(plan, batch_command(plan))

    def check(self, plan: JobPlan) -> None:
        try:
            partitions = parse_partitions(ask("scontrol", "-o", "show", "partition"))
        except (SlurmUnreachable, SlurmRefused) as error:
            raise UsageError(f"slurmctld does not answer: {error}. Nothing was submitted; try again later.") from error
        if problem := over_limits(plan, partitions):
            raise UsageError(problem)

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        (RunDir(plan.run_dir).path / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes none for the job's output
        answer = submission.submit(plan, self.render(plan), submit_options(plan))
        if answer.outcome == "accepted":
            return
        found = standing(plan)
        if found.liveness == "gone" and not _has_begun(plan):
            raise DtrainError(f"Slurm has not accepted the job: {answer.words}. Nothing was started; launch again.")
        if found.liveness == "unknown":
            raise SlurmUnreachable(
                f"whether Slurm has accepted job {plan.job_id} is not known: {answer.words}. As soon as slurmctld "
                f"answers, `dtrain status {plan.name}` says so; until then a new launch is refused."
            )

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        return standing(plan, max_age_s).liveness

    def reason(self, plan: JobPlan) -> str:
        return standing(plan, math.inf).words

    def called(self, plan: JobPlan) -> str:
        number = owner.slurm_job_id(_control(plan))
        return f"Slurm job {number}" if number else ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return plan.slurm.on_stop != "none"

    def hasten(self, plan: JobPlan) -> None:
        """Slurm holds a requeued job for two minutes as a rule, against old credentials. Whoever may change the job may
        let it go at once, when it is back in the queue; done once a restart."""
        control = _control(plan)
        newest = owner.newest_owner(control)
        held = [job for job in standing(plan, math.inf).jobs if job.phase == "pending" and job.reason == "BeginTime"]
        if not held or (newest is None and not control.ended.exists()):
            return  # one that has not run yet waits for a time that its user gave
        mark = control.path / f"slurm-hastened-{newest.number if newest else 0:04d}"
        if write_once(mark, b"", 0o600):
            with contextlib.suppress(SlurmUnreachable, SlurmRefused, UsageError):
                ask("scontrol", "update", f"JobId={held[-1].job_id}", "StartTime=now")

    def stop(self, plan: JobPlan) -> None:
        for job in self._alive(plan):
            if job.phase == "pending":
                _scancel("--state=PENDING", job)
            if job.phase == "running":
                # Where the end is written down there is nothing to save: only its coming back is to be prevented.
                _scancel(*(() if _control(plan).ended.exists() else _STOP), job)

    def kill(self, plan: JobPlan) -> None:
        for job in self._alive(plan):
            if job.phase != "completing":
                _scancel(job)

    def _alive(self, plan: JobPlan) -> tuple[JobRecord, ...]:
        found = standing(plan)
        if found.liveness == "unknown":
            raise SlurmUnreachable(f"{plan.name}: {found.words}. Try again when it does.")
        return found.jobs

    def clear(self, plan: JobPlan) -> None:
        node.clear(plan)

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        return node.lose_node(plan, node_rank, reason, enough=enough, alive=alive)


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _has_begun(plan: JobPlan) -> bool:
    newest = owner.newest_owner(_control(plan))
    return newest is not None and not newest.is_nobody


def _scancel(*words: str | JobRecord) -> None:
    """A job that has ended meanwhile needs none."""
    with contextlib.suppress(SlurmRefused):
        ask("scancel", *(str(word.job_id) if isinstance(word, JobRecord) else word for word in words))
