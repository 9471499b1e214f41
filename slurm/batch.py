"""Back end `slurm`: a job submitted with sbatch, whose script becomes `dtrain launch --batch` on its first node."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.interfaces import Interface
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import RunDir, write_atomic
from dtrain.cluster.zygote import Zygote
from dtrain.slurm import jobenv, node
from dtrain.slurm.owner import note_submission, slurm_job_id
from dtrain.slurm.script import batch_command, render_script

_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBackend:
    agent_args: tuple[str, ...] = ()

    @property
    def detaches(self) -> bool:
        return True

    def render(self, plan: JobPlan) -> str:
        return render_script(plan, batch_command(plan))

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        control = RunDir(plan.run_dir).control(plan.job_id)
        script = control.path / "job.sbatch"
        write_atomic(script, self.render(plan), 0o600)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        if "SLURM_CONF" in os.environ:
            environ["SLURM_CONF"] = os.environ["SLURM_CONF"]
        said = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=environ)
        if said.returncode != 0:
            raise DtrainError(f"sbatch: {said.stderr.strip()}")
        note_submission(control, said.stdout.strip().partition(";")[0])

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        job_id = slurm_job_id(RunDir(plan.run_dir).control(plan.job_id))
        if job_id is None:
            return "unknown"
        said = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True)
        if said.returncode != 0:
            return "gone" if "Invalid job id" in said.stderr else "unknown"
        return "gone" if any(f"JobState={state}" in said.stdout for state in _OVER) else "alive"

    def reason(self, plan: JobPlan) -> str:
        return ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return True

    def hasten(self, plan: JobPlan) -> None:
        pass

    def stop(self, plan: JobPlan) -> None:
        self._scancel(plan, "--signal=TERM", "--batch")

    def kill(self, plan: JobPlan) -> None:
        self._scancel(plan)

    def _scancel(self, plan: JobPlan, *options: str) -> None:
        job_id = slurm_job_id(RunDir(plan.run_dir).control(plan.job_id))
        if job_id is not None:
            subprocess.run(["scancel", *options, job_id], capture_output=True)

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        return node.start_node(plan, node_rank)

    def clear(self, plan: JobPlan) -> None:
        pass  # what is left of the job ends with its allocation

    def give_back(self, plan: JobPlan, nodes: Sequence[int], reason: str) -> bool:
        return False

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return jobenv.worker_environ(environ)

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        return node.interface(plan)
