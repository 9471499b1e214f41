"""What is to be started, complete and pure: a back end renders a JobPlan and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dtrain.cluster.kubernetesconfig import KubernetesConfig
from dtrain.cluster.rayconfig import RayConfig
from dtrain.cluster.slurmconfig import ContainerConfig, SlurmConfig
from dtrain.cluster.sshconfig import SshConfig
from dtrain.cluster.version import VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The `cluster:` section: which engine starts the processes, and how many."""

    backend: Literal["local", "slurm", "ray", "kubernetes", "ssh", "mpi", "auto"] = field(
        default="local",
        metadata={
            "doc": "the engine that starts the nodes; auto: the Slurm job that this process is in, the machines of "
            "cluster.ssh, RAY_ADDRESS, a Slurm that answers, else local; the launch says which and why"
        },
    )
    nodes: int = field(default=1, metadata={"doc": "nodes of the job; `launch --nodes N` overrides it", "min": 1})
    procs_per_node: int | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "worker processes a node; auto: one a GPU, or one where there is none", "min": 1},
    )
    gpus_per_node: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "GPUs that a node uses; auto: this machine's, shared out (local), as many as it has (ssh), or those "
            "that cluster.slurm asks for (slurm); none (ray)",
            "min": 0,
        },
    )
    cpus_per_node: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "cores that a node uses; auto: this machine's, shared out (local), or cpus_per_proc for each worker "
            "where that is set, else what the scheduler gives (slurm)",
            "min": 1,
        },
    )
    cpus_per_proc: int | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "threads of each worker (OMP_NUM_THREADS); auto: the node's cores over its workers", "min": 1},
    )
    env: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "environment variables for the workers; one that you exported wins"}
    )
    secrets: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "variables that workers need and nobody may read: NAME, which you have exported, or "
            "NAME=file:PATH, read from a file on each node at every start; the values reach the workers, but no file, "
            "command line or log of dtrain"
        },
    )
    setup: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "lines of bash run on each node before anything else there; one that fails ends the job with 93"
        },
    )
    python: str = field(
        default="auto", metadata={"doc": "the nodes' Python, which has dtrain; auto: the path of the submitting one"}
    )
    interface: str = field(
        default="auto",
        metadata={"doc": "network interface of the nodes' traffic: a name, or a range of addresses like 10.0.0.0/8"},
    )
    code: Literal["auto", "bundle", "live"] = field(
        default="auto",
        metadata={
            "doc": "bundle: the nodes run a copy of your code as it was at the launch; live: what lies in your "
            "folders; auto: bundle, and live for a script, which may write beside itself, and for an image with its "
            "own Python"
        },
    )
    bundle_limit_mb: int = field(default=100, metadata={"doc": "the most that such a copy may have, in MB", "min": 1})
    port_range: tuple[int, ...] | None = field(
        default=None,
        metadata={"doc": "first and last port to listen on, like [29400, 29499]; left out: any free one"},
    )
    slurm: SlurmConfig = field(default=SlurmConfig(), metadata={"doc": "what a Slurm job asks for"})
    ray: RayConfig = field(default=RayConfig(), metadata={"doc": "where Ray is, what a node takes of it (backend ray)"})
    ssh: SshConfig = field(default=SshConfig(), metadata={"doc": "the machines that ssh reaches (backend ssh)"})
    kubernetes: KubernetesConfig = field(
        default=KubernetesConfig(), metadata={"doc": "what the pods of a run are made of (backend kubernetes)"}
    )
    container: ContainerConfig | None = field(
        default=None, metadata={"doc": "an image for the nodes' processes (backend slurm)"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """One submission. `sys_path` goes in front of the workers' module search path, first entry first."""

    name: str
    run_dir: str  # absolute, or a URL
    job_id: str
    backend: str
    nodes: int
    procs_per_node: int
    gpus_per_node: int  # 0: the workers run on CPU with gloo
    threads_per_proc: int  # 0: the cores of the node over its workers, decided there
    python: str  # absolute path of the interpreter on the nodes
    argv: tuple[str, ...]  # what the person typed
    cwd: str
    sys_path: tuple[str, ...]
    env: dict[str, str]
    checkpoint_url: str
    workers: Literal["warm", "exec"]
    max_restarts_without_progress: int
    kind: Literal["model", "script"] = "model"  # what the workers run: our trainer, or the user's script
    setup: tuple[str, ...] = ()  # lines of bash
    secrets: tuple[str, ...] = ()  # entries of cluster.secrets: cluster/secretrefs.py; never a value
    interface: str = "auto"
    port_range: tuple[int, int] | None = None  # first and last
    fewer_nodes: tuple[int, ...] = ()  # numbers below `nodes` with which the run may go on where nodes are lost
    why_not_fewer: str = ""  # why it can't with one node less
    version: str = VERSION  # of the submitting dtrain
    code_digest: str = ""  # sha256 of the archive in the run directory; "": the nodes use the code where it lies
    code_roots: dict[str, str] = field(default_factory=dict)  # folder in the archive -> of what it is a copy
    config: str = ""  # absolute path of the file that was launched
    overrides: tuple[str, ...] = ()  # key=value words that came with it, options like --nodes among them
    cpus_per_node: int = 0  # 0: what the scheduler gives
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    container: ContainerConfig | None = None
    hosts: tuple[str, ...] = ()  # ssh: as it takes them, behind the first `nodes` spare ones; mpi: own names
    ssh_options: tuple[str, ...] = ()
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    def most_nodes(self, at_hand: int) -> int:
        """With how many nodes an attempt runs where so many are at hand; 0: it can't."""
        return max((number for number in (*self.fewer_nodes, self.nodes) if number <= at_hand), default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> JobPlan:
        """From job.json too, which holds more than the plan: `submitted_at`, `steps`, `git_commit`."""
        known = {name: data[name] for name in JobPlan.__dataclass_fields__ if name in data}
        typed: dict[str, Any] = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        typed["slurm"] = SlurmConfig.from_json(data.get("slurm") or {})
        typed["kubernetes"] = KubernetesConfig.from_json(data.get("kubernetes") or {})
        typed["ray"] = RayConfig.from_json(data.get("ray") or {})
        if data.get("container") is not None:
            typed["container"] = ContainerConfig.from_json(data["container"])
        return JobPlan(**{**known, **typed})


def with_threads(plan: JobPlan, cores: int) -> JobPlan:
    """The plan on a node that has `cores`: the threads of a worker decided, where they were left to it."""
    return replace(plan, threads_per_proc=plan.threads_per_proc or max(1, cores // plan.procs_per_node))


def worker_environ(plan: JobPlan, environ: Mapping[str, str]) -> dict[str, str]:
    """The workers' variables: what the user exported wins over the config, the config over what follows from cores."""
    return {"OMP_NUM_THREADS": str(plan.threads_per_proc), **plan.env, **environ}
