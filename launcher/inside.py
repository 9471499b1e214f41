"""A launch inside of a Slurm allocation: what is there wins over what the config's cluster section asks for. Pure;
starting the nodes is slurm/allocation.py's or slurm/driver.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dtrain.cluster.configfile import DEFAULT
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import ClusterConfig
from dtrain.launcher.compose import LaunchConfig
from dtrain.launcher.console import plural
from dtrain.launcher.topology import shape_nodes
from dtrain.slurm.jobenv import SlurmJob
from dtrain.slurm.options import gpu_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """How to read the config again, so that it asks for what is there."""

    nodes: int
    overrides: tuple[str, ...]


def fit(cluster: ClusterConfig | None, origins: Mapping[str, str], here: SlurmJob, *, whole: bool) -> Fitted:
    """`whole`: all nodes of the allocation, else as many as the config asks for and all where it says nothing. None:
    the config could not be read without this. Raises UsageError where the allocation is too small."""
    nodes = len(here.nodes)
    asked = None if cluster is None or origins.get("cluster.nodes") == DEFAULT else cluster.nodes
    if not whole and asked is not None and asked > nodes:
        raise UsageError(
            f"cluster.nodes: {asked}, but this allocation (Slurm job {here.id}) has {plural(nodes, 'node')}. Set "
            f"--nodes {nodes}, ask for a larger one, or submit a job of its own: --submit"
        )
    nodes = asked if asked is not None and not whole else nodes
    return Fitted(nodes=nodes, overrides=tuple(_gpus(cluster, here.gpus_per_node, nodes)))


def _gpus(cluster: ClusterConfig | None, gpus: int, nodes: int) -> Iterator[str]:
    """What was for sbatch is put right too: it would speak against what sbatch gave."""
    yield f"cluster.gpus_per_node={gpus}"
    if cluster is not None and cluster.slurm.gpus_per_node is not None:
        yield f"cluster.slurm.gpus_per_node={gpus or 'null'}"
    given = {"gres": f"gpu:{gpus}", "gpus": str(gpus * nodes), "gpus-per-task": str(gpus)}
    for option in () if cluster is None else gpu_options(cluster.slurm.sbatch):
        if option in given:
            yield f"cluster.slurm.sbatch.{option}={given[option]}"


def differences(asked: LaunchConfig, here: SlurmJob, environ: Mapping[str, str]) -> list[str]:
    """Lines that say what of the config's cluster section the job's header has overruled."""
    slurm = asked.cluster.slurm
    gpus = shape_nodes(asked.cluster, gpus=0, cores=1).gpus_per_node
    nodes = None if asked.origins["cluster.nodes"] == DEFAULT else asked.cluster.nodes
    rows = [
        ("nodes", nodes, len(here.nodes)),
        ("GPUs a node", gpus if asked.cluster.backend == "slurm" else None, here.gpus_per_node),
        ("partition", slurm.partition, environ.get("SLURM_JOB_PARTITION")),
        ("account", slurm.account, environ.get("SLURM_JOB_ACCOUNT")),
        ("qos", slurm.qos, environ.get("SLURM_JOB_QOS")),
    ]
    where = {"nodes": asked.origins.get("cluster.nodes", "")}
    return [
        f"{what}: {found}, not {wanted} as {where.get(what, 'the config')} says"
        for what, wanted, found in rows
        if wanted is not None and found is not None and str(wanted) != str(found)
    ]
