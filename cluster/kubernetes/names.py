"""What a job's objects are called, and how they are found again. Pure."""

from __future__ import annotations

import re

from dtrain.cluster.jobplan import JobPlan

JOB_ID = "dtrain/job-id"  # the label by which pods are listed
RUN = "dtrain/run"  # annotations: the run's own name, and its place
RUN_DIR = "dtrain/run-dir"

# An Indexed Job's pods are called JOB-INDEX as hosts, a DNS label of 63 characters; a Service's begins with a letter.
_MAX = 63 - len("-99999")


def object_name(plan: JobPlan) -> str:
    """The Job's and the Service's: of the run's name what DNS takes, and the job id, which makes it the only one."""
    unique = plan.job_id.removeprefix(f"{plan.backend}-")
    room = _MAX - len(unique) - 1
    words = re.sub(r"[^a-z0-9]+", "-", plan.name.lower()).strip("-")[:room].strip("-")
    if not words or not words[0].isalpha():
        words = f"run-{words}"[:room].strip("-")
    return f"{words}-{unique}"
