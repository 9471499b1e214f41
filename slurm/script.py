"""The script of a Slurm job: slurm/job.sbatch filled in. Pure; submitting it is slurm/batch.py's, what happens in the
job slurm/driver.py's. Nothing in it depends on Slurm's version.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import batch_script
from dtrain.slurm.options import directive, header_options

_TEMPLATE = Path(__file__).with_name("job.sbatch")


def render_script(plan: JobPlan, command: Sequence[str]) -> str:
    """The text for sbatch. `command` is what it becomes, its Python first: batch_command's, as a rule."""
    setup = () if plan.container else plan.setup  # with a container those lines are for inside it
    options = "\n".join(directive(option) for option in header_options(plan))
    before, middle, after = _split(_TEMPLATE.read_text())
    return before + options + middle + batch_script(plan, command, setup) + after


def _split(template: str) -> tuple[str, str, str]:
    before, _, rest = template.partition("@OPTIONS@")
    middle, _, after = rest.partition("@BODY@\n")
    return before, middle, after


def batch_command(plan: JobPlan) -> tuple[str, ...]:
    """`dtrain launch --batch`, as the script calls it. The driver runs beside a container, not in it."""
    python = sys.executable if plan.container else plan.python
    where = ("--run-dir", plan.run_dir, "--name", plan.name, "--job-id", plan.job_id)
    return (python, "-P", "-m", "dtrain.launcher.cli", "launch", "--batch", *where, plan.config, *plan.overrides)
