"""The two creates of a submission, so that no Job is lost and none is doubled, whatever dies half way. control/<job_id>
has kubernetes.json (where, put once before anything is sent) and kubernetes-job.json (the Job's uid, once it is known).
Whoever finds the first without the second asks the cluster, which knows the Job by a name that no other job has.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes.client import Client, KubernetesRefused, Object, Place
from dtrain.cluster.kubernetes.names import JOB_ID, RUN_DIR, object_name
from dtrain.cluster.kubernetes.render import render_job, render_service
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import Control, RunDir, put_end, read_json, write_atomic, write_once

_UNSENT_S = 60.0  # from the record of a launch to its Job: longer means that the launch died in between


def submit(plan: JobPlan, client: Client, place: Place) -> None:
    """Raises UsageError where the cluster refuses it, KubernetesUnreachable where that is not known."""
    control = _control(plan)
    record = {**asdict(place), "by": ProcessId.of(os.getpid()).to_json()}
    if not write_once(_intent(control), json.dumps(record), 0o600):
        raise UsageError(f"{plan.run_dir}: job {plan.job_id} was given up before it was submitted. Launch again.")
    try:
        job = create_job(plan, client)
        complete(plan, client, job)
    except KubernetesRefused as error:
        raise UsageError(f"Kubernetes refuses the job: {error}") from error


def create_job(plan: JobPlan, client: Client) -> Object:
    """The Job, made now or by an earlier request of ours whose answer was lost."""
    name = object_name(plan)
    try:
        return client.create(render_job(plan))
    except KubernetesRefused as error:
        there = client.job(name) if error.status == 409 else None
        if there is None:
            raise
    meta = there["metadata"]
    if (meta.get("labels") or {}).get(JOB_ID) != plan.job_id or meta["annotations"].get(RUN_DIR) != plan.run_dir:
        raise UsageError(f"namespace {client.namespace} has a Job {name} that belongs to another run. Launch again.")
    return there


def complete(plan: JobPlan, client: Client, job: Object) -> None:
    """What a submission still lacks once there is a Job."""
    write_atomic(_known(_control(plan)), json.dumps({"uid": job["metadata"]["uid"]}), 0o600)
    try:
        client.create(render_service(plan, job["metadata"]["uid"]))
    except KubernetesRefused as error:
        if error.status != 409:
            raise


def is_complete(plan: JobPlan, client: Client) -> bool:
    return client.service(object_name(plan)) is not None


def place_of(plan: JobPlan) -> Place | None:
    """Where the job was submitted to; None where that has not come to pass."""
    record = read_json(_intent(_control(plan)))
    return (
        None
        if record is None or not record["namespace"]
        else Place(context=str(record["context"]), namespace=str(record["namespace"]))
    )


def was_there(plan: JobPlan) -> bool:
    """Whether the Job is known to have been made."""
    return _known(_control(plan)).exists()


def is_underway(plan: JobPlan) -> bool:
    """Whether a launch may still be about to make the Job."""
    control = _control(plan)
    record = read_json(_intent(control))
    if record is None:
        return control.path.exists() and time.time() - control.path.stat().st_mtime < _UNSENT_S
    if not record["namespace"]:
        return False  # it was given up
    by = ProcessId.from_json(record["by"]).liveness()
    return by == "alive" or (by == "unknown" and time.time() - _intent(control).stat().st_mtime < _UNSENT_S)


def abandon(plan: JobPlan) -> None:
    """Ends a job of which the cluster has no trace. Should a request arrive there hours later, its pods find this end,
    and the Job ends with them."""
    run, control = RunDir(plan.run_dir), _control(plan)
    if not control.path.exists():
        return
    write_once(_intent(control), json.dumps({"context": "", "namespace": ""}), 0o600)  # nobody's: it can't begin now
    put_end(run, control, state="failed", exit_code=exits.FAILED, reason=NEVER, step=0)


NEVER = "was never submitted: its launch ended before Kubernetes had it"


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _intent(control: Control) -> Path:
    return control.path / "kubernetes.json"


def _known(control: Control) -> Path:
    return control.path / "kubernetes-job.json"
