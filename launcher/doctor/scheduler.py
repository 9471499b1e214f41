"""The Slurm of this host, where it has one: which version, and whether its controller answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from dtrain.cluster.errors import DtrainError
from dtrain.launcher.doctor.finding import Finding, ok, warn
from dtrain.slurm.client import ask
from dtrain.slurm.records import OLDEST, parse_version

TOPIC = "scheduler"
_PATIENCE_S = 15.0


def examine() -> Iterator[Finding]:
    """Nothing on a host without sbatch."""
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
