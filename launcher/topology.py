"""How many workers, GPUs and threads each node gets: the `auto`s of the cluster section, decided in one place. Pure."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.sshconfig import slots_of
from dtrain.slurm.options import requested_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    procs_per_node: int
    gpus_per_node: int
    threads_per_proc: int  # 0: decided on the node
    cpus_per_node: int = 0  # 0: what the scheduler gives


def shape_nodes(cluster: ClusterConfig, *, gpus: int, cores: int) -> NodeShape:
    """`gpus` and `cores` of this machine: `local` shares them out among its simulated nodes, `ssh` takes the others for
    ones like it."""
    match cluster.backend:
        case "local":
            return _shape_local(cluster, gpus, cores)
        case "ssh":
            return _shape_ssh(cluster, gpus)
        case "kubernetes":
            return _shape_asked(cluster, None)
        case "ray":
            return _shape_ray(cluster)
        case _:
            return _shape_asked(cluster, requested_gpus(cluster))


def _shape_local(cluster: ClusterConfig, gpus: int, cores: int) -> NodeShape:
    """More nodes than GPUs leave the GPUs alone: NCCL takes no two ranks on one GPU, so such a run trains on CPUs."""
    gpus_per_node = gpus // cluster.nodes if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    cpus = max(1, cores // cluster.nodes) if cluster.cpus_per_node == "auto" else cluster.cpus_per_node
    procs = max(1, gpus_per_node) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    threads = max(1, cpus // procs) if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(procs_per_node=procs, gpus_per_node=gpus_per_node, threads_per_proc=threads)


def _shape_ssh(cluster: ClusterConfig, gpus: int) -> NodeShape:
    """A host file's slots are the processes of a node, and no more GPUs than that are used. What is wrong with the list
    of hosts is said elsewhere."""
    slots = None
    if cluster.procs_per_node == "auto":
        with contextlib.suppress(ValueError):
            slots = slots_of(cluster.ssh.read_hosts()[: cluster.nodes])
    own = min(gpus, slots or gpus) if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    procs = (slots or max(1, own)) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    return NodeShape(
        procs_per_node=procs,
        gpus_per_node=own,
        threads_per_proc=0 if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc,
        cpus_per_node=0 if cluster.cpus_per_node == "auto" else cluster.cpus_per_node,
    )


def _shape_ray(cluster: ClusterConfig) -> NodeShape:
    """Nothing is counted here. Where the config gives a node's CPUs they are its workers'; else Ray is asked for one a
    worker, and the workers share the cores that they find."""
    gpus = 0 if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    procs = max(1, gpus) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    cpus = 0 if cluster.cpus_per_node == "auto" else cluster.cpus_per_node
    threads = cpus // procs if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(
        procs_per_node=procs, gpus_per_node=gpus, threads_per_proc=threads, cpus_per_node=cpus or procs * threads
    )


def _shape_asked(cluster: ClusterConfig, scheduler_gpus: int | None) -> NodeShape:
    """Nothing is counted here: the submit host is not one of the nodes. `scheduler_gpus`: what the scheduler's own
    options ask for."""
    gpus = (scheduler_gpus or 0) if cluster.gpus_per_node == "auto" else cluster.gpus_per_node
    procs = max(1, gpus) if cluster.procs_per_node == "auto" else cluster.procs_per_node
    threads = 0 if cluster.cpus_per_proc == "auto" else cluster.cpus_per_proc
    return NodeShape(
        procs_per_node=procs,
        gpus_per_node=gpus,
        threads_per_proc=threads,
        cpus_per_node=procs * threads if cluster.cpus_per_node == "auto" else cluster.cpus_per_node,
    )
