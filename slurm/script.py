"""The scripts for sbatch: slurm/job.sbatch filled in for one launch, slurm/train.sbatch for a person to keep. Pure;
submitting is slurm/submission.py's, what happens in the job slurm/driver.py's. Nothing in them depends on Slurm's
version.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import batch_script
from dtrain.slurm.options import directive, header_options

_FOLDER = Path(__file__).parent
_PLACE = re.compile(r"@([A-Z]+)@")
# What a person will want to set, beside what the config asks for already.
_SUGGESTED = ("partition=NAME", "account=NAME", "time=1-00:00:00", "gres=gpu:4", "cpus-per-task=16", "mem=0")


def render_script(plan: JobPlan, command: Sequence[str]) -> str:
    """The text for sbatch. `command` is what it becomes, its Python first: batch_command's, as a rule."""
    setup = () if plan.container else plan.setup  # with a container those lines are for inside it
    body = batch_script(plan, command, setup).removesuffix("\n")
    return _fill("job.sbatch", {"OPTIONS": _header(header_options(plan)), "BODY": body})


def render_by_hand(plan: JobPlan) -> str:
    """The text of a script that trains plan.config, or the config that sbatch is given behind it."""
    options = header_options(plan)
    asked = {option.partition("=")[0] for option in options}
    suggested = [f"#{directive(f'--{option}')}" for option in _SUGGESTED if f"--{option.split('=')[0]}" not in asked]
    texts = {
        "OPTIONS": "\n".join([_header(options), *suggested]),
        "SETUP": "".join(f"{line}\n" for line in (() if plan.container else plan.setup)),
        "PYTHON": shlex.quote(batch_command(plan)[0]),
        "CONFIG": shlex.quote(plan.config),
    }
    return _fill("train.sbatch", texts)


def _header(options: Sequence[str]) -> str:
    return "\n".join(directive(option) for option in options)


def _fill(template: str, texts: Mapping[str, str]) -> str:
    """What stands in a text is no place itself."""
    return _PLACE.sub(lambda place: texts[place[1]], (_FOLDER / template).read_text())


def batch_command(plan: JobPlan) -> tuple[str, ...]:
    """`dtrain launch --batch`, as the script calls it. The driver runs beside a container, not in it."""
    python = sys.executable if plan.container else plan.python
    where = ("--run-dir", plan.run_dir, "--name", plan.name, "--job-id", plan.job_id)
    return (python, "-P", "-m", "dtrain.launcher.cli", "launch", "--batch", *where, plan.config, *plan.overrides)
