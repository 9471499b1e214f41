"""The schedulers that this host may submit to, where it has their commands or clients: which versions, and whether they
answer. A cluster of Ray's that only a config names is asked by a launch."""

from __future__ import annotations

import importlib.metadata as metadata
import shutil
from collections.abc import Iterator

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.ray.jobs import Jobs, is_installed
from dtrain.launcher.doctor.finding import Finding, ok, warn
from dtrain.slurm.client import ask
from dtrain.slurm.records import OLDEST, parse_version

TOPIC = "scheduler"
_PATIENCE_S = 15.0


def examine() -> Iterator[Finding]:
    """Nothing on a host without sbatch and Ray."""
    yield from _ray()
    if shutil.which("sbatch") is None:
        return
    try:
        said = ask("sbatch", "--version", timeout_s=_PATIENCE_S)
        answer = ask("scontrol", "ping", timeout_s=_PATIENCE_S).strip()
    except DtrainError as error:
        advice = "Launches with backend: slurm wait for it. Is this a login node, and is SLURM_CONF right?"
        yield warn(TOPIC, "slurm", f"does not answer: {error}", advice)
        return
    version = parse_version(said)
    if version is None or version < OLDEST:
        found = str(version) if version else said.strip()
        yield warn(TOPIC, "slurm", found, f"dtrain is made for {OLDEST} and newer: try a small run first.")
    else:
        yield ok(TOPIC, "slurm", f"{version}, {'; '.join(answer.splitlines())}")


def _ray() -> Iterator[Finding]:
    """Its version, and the cluster that `cluster.ray.address: auto` would find."""
    if not is_installed():
        return
    version = metadata.version("ray")
    try:
        jobs = Jobs("auto")
        theirs = jobs.version()
    except DtrainError:
        yield ok(TOPIC, "ray", f"{version}; no cluster at RAY_ADDRESS or on this machine")
        return
    if theirs == version:
        yield ok(TOPIC, "ray", f"{version}, cluster at {jobs.url}")
    else:
        yield warn(TOPIC, "ray", f"{version}, but the cluster at {jobs.url} has {theirs}", f"pip install ray=={theirs}")
