"""`cluster.backend: auto`: the engine that this machine is inside of, or was set up for, and one line that says so. It
never takes one that a laptop merely happens to reach: what a kubeconfig names may be somebody's production.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import ClusterConfig

_RANK_OF_MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_PING_S = 5.0
_HERE = "--backend local trains on this machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """`machines`: those that the config lists for ssh. `slurm`: the cluster whose slurmctld answers, "" where Slurm is
    not installed, None where it does not answer. `kubernetes`: the kubeconfig's current context, "" for none. `ray`:
    that a `ray start` has left the address of a cluster here."""

    environ: Mapping[str, str]
    machines: bool = False
    slurm: str | None = ""
    kubernetes: str = ""
    ray: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    backend: Literal["local", "slurm", "ray", "ssh"]
    why: str


def choose(found: Surroundings) -> Choice:
    """Pure. Raises UsageError where any choice would surprise."""
    environ = found.environ
    if job := environ.get("SLURM_JOB_ID"):
        return Choice(backend="slurm", why=f"inside of Slurm job {job}; {_HERE}")
    if any(name in environ for name in _RANK_OF_MPI):
        raise UsageError("cluster.backend: auto: mpirun has started this process. Say `dtrain run` instead.")
    if found.machines:
        return Choice(backend="ssh", why=f"cluster.ssh lists machines; {_HERE}")
    if address := environ.get("RAY_ADDRESS"):
        return Choice(backend="ray", why=f"RAY_ADDRESS is {address}; {_HERE}")
    if found.slurm is None:
        raise UsageError(
            "cluster.backend: auto: sbatch is installed, but slurmctld does not answer. Try again, or say "
            "--backend slurm to wait for it, --backend local to train on this machine."
        )
    if found.slurm:
        return Choice(backend="slurm", why=f"sbatch answers (cluster {found.slurm}); {_HERE}")
    return Choice(backend="local", why="".join(["this machine", *_left_alone(found)]))


def _left_alone(found: Surroundings) -> list[str]:
    others = []
    if found.ray:
        others.append("; a Ray cluster runs here: --backend ray")
    if "KUBERNETES_SERVICE_HOST" in found.environ:
        others.append("; this is a pod: --backend kubernetes starts others")
    elif found.kubernetes:
        others.append(f"; the kubeconfig's context is {found.kubernetes}: --backend kubernetes submits there")
    return others


def resolve(cluster: ClusterConfig) -> Choice:
    """Looks around, once for one process. Raises UsageError."""
    return _resolve(bool(cluster.ssh.hosts or cluster.ssh.hostfile))


@cache
def _resolve(machines: bool) -> Choice:
    inside = "SLURM_JOB_ID" in os.environ or machines or "RAY_ADDRESS" in os.environ
    return choose(
        Surroundings(
            environ=dict(os.environ),
            machines=machines,
            slurm="" if inside else _slurm(),
            kubernetes=_context(),
            ray=Path("/tmp/ray/ray_current_cluster").exists(),
        )
    )


def _slurm() -> str | None:
    from dtrain.slurm.client import ask

    if shutil.which("sbatch") is None:
        return ""
    try:
        ask("scontrol", "ping", timeout_s=_PING_S)
        settings = ask("scontrol", "show", "config", timeout_s=_PING_S)
    except DtrainError:
        return None
    named = [line.partition("=")[2].strip() for line in settings.splitlines() if line.startswith("ClusterName ")]
    return named[0] if named else "without a name"


def _context() -> str:
    """A kubeconfig that can't be read names none: it was not asked for."""
    for path in (os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")).split(os.pathsep):
        try:
            tree = yaml.safe_load(Path(path).read_text())
        except (yaml.YAMLError, OSError, ValueError):
            continue
        if isinstance(tree, dict) and isinstance(said := tree.get("current-context"), str) and said:
            return said
    return ""
