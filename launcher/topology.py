"""How many workers, GPUs and threads each node gets: the `auto`s of the cluster section, decided in one place. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.cluster.jobplan import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    procs_per_node: int
    gpus_per_node: int
    threads_per_proc: int


def shape_nodes(cluster: ClusterConfig, *, gpus: int, cores: int) -> NodeShape:
    """`gpus` and `cores` of this machine, which `local` shares out among its simulated nodes.

    More nodes than GPUs leave the GPUs alone: NCCL takes no two ranks on one GPU, so such a run trains on CPUs.
    """
    gpus_per_node = gpus // cluster.nodes
    procs = max(1, gpus_per_node) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    threads = max(1, cores // (cluster.nodes * procs)) if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(procs_per_node=procs, gpus_per_node=gpus_per_node, threads_per_proc=threads)
