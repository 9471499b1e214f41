"""How many workers, GPUs and threads each node gets: the `auto`s of the cluster section, decided in one place. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.cluster.jobplan import ClusterConfig
from dtrain.slurm.options import requested_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    procs_per_node: int
    gpus_per_node: int
    threads_per_proc: int  # 0: decided on the node
    cpus_per_node: int = 0  # 0: what the scheduler gives


def shape_nodes(cluster: ClusterConfig, *, gpus: int, cores: int) -> NodeShape:
    """`gpus` and `cores` of this machine, which only `local` uses: it shares them out among its simulated nodes."""
    return _shape_local(cluster, gpus, cores) if cluster.backend == "local" else _shape_slurm(cluster)


def _shape_local(cluster: ClusterConfig, gpus: int, cores: int) -> NodeShape:
    """More nodes than GPUs leave the GPUs alone: NCCL takes no two ranks on one GPU, so such a run trains on CPUs."""
    gpus_per_node = gpus // cluster.nodes if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    cpus = max(1, cores // cluster.nodes) if cluster.cpus_per_node == "auto" else cluster.cpus_per_node
    procs = max(1, gpus_per_node) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    threads = max(1, cpus // procs) if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(procs_per_node=procs, gpus_per_node=gpus_per_node, threads_per_proc=threads)


def _shape_slurm(cluster: ClusterConfig) -> NodeShape:
    """Nothing is counted here: the submit host is not one of the nodes."""
    asked = requested_gpus(cluster) if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    gpus = asked or 0
    procs = max(1, gpus) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    threads = 0 if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(
        procs_per_node=procs,
        gpus_per_node=gpus,
        threads_per_proc=threads,
        cpus_per_node=procs * threads if cluster.cpus_per_node == "auto" else cluster.cpus_per_node,
    )
