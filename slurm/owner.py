"""Which Slurm job holds a dtrain job. Requeues and resubmissions hand it on: control/<job_id>/slurm-owner-0001.json,
-0002.json ..., one a start of the driver, each put once. The newest holds it; its number is the job's incarnation.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dtrain.cluster.rundir import Control, read_json, read_newest, write_atomic, write_once

_PREFIX = "slurm-owner-"
_SUBMITTED = "slurm-submitted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One start of the driver."""

    number: int  # from 1
    slurm_job_id: str
    restart: int  # SLURM_RESTART_COUNT
    cluster: str
    name: str  # of the Slurm job
    user: str
    host: str  # where the driver runs
    nodes: tuple[str, ...]  # Slurm's names, by node rank
    at: float

    @property
    def incarnation(self) -> str:
        return f"{self.slurm_job_id}.{self.restart}"

    @property
    def is_nobody(self) -> bool:
        """The job was given up before Slurm was known to have it: whoever comes now is too late."""
        return not self.slurm_job_id

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Owner:
        known = {name: data[name] for name in Owner.__dataclass_fields__}
        return Owner(**{**known, "nodes": tuple(known["nodes"])})


def newest_owner(control: Control) -> Owner | None:
    record = read_newest(control.path, _PREFIX)
    return None if record is None else Owner.from_json(record)


def claim(control: Control, environ: Mapping[str, str], nodes: Sequence[str], after: Owner | None) -> Owner | None:
    """Makes the Slurm job of `environ` the owner, in the place of `after`; None where another was quicker."""
    owner = Owner(
        number=1 if after is None else after.number + 1,
        slurm_job_id=environ["SLURM_JOB_ID"],
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        name=environ.get("SLURM_JOB_NAME", ""),
        user=getpass.getuser(),
        host=socket.gethostname(),
        nodes=tuple(nodes),
        at=round(time.time(), 3),
    )
    path = control.path / f"{_PREFIX}{owner.number:04d}.json"
    return owner if write_once(path, json.dumps(asdict(owner)), 0o600) else None


def claim_for_nobody(control: Control) -> bool:
    """Keeps the job from ever beginning; False where it has begun."""
    nobody = Owner(
        number=1, slurm_job_id="", restart=0, cluster="", name="", user=getpass.getuser(), host=socket.gethostname(),
        nodes=(), at=round(time.time(), 3),
    )  # fmt: skip
    return write_once(control.path / f"{_PREFIX}0001.json", json.dumps(asdict(nobody)), 0o600)


def note_submission(control: Control, slurm_job_id: str, cluster: str = "") -> None:
    """By the client, once sbatch has said the number."""
    record = {"slurm_job_id": slurm_job_id, "cluster": cluster, "host": socket.gethostname(), "pid": os.getpid()}
    write_atomic(control.path / _SUBMITTED, json.dumps({**record, "at": round(time.time(), 3)}), 0o600)


def slurm_job_id(control: Control) -> str | None:
    """The Slurm job that holds the job, or will once it starts; None before sbatch has answered."""
    owner = newest_owner(control)
    if owner is not None:
        return owner.slurm_job_id
    submitted = read_json(control.path / _SUBMITTED)
    return None if submitted is None else str(submitted["slurm_job_id"])
