"""LaunchConfig -> JobPlan: every `auto` of the cluster section decided. Starts and writes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Literal

from dtrain.cluster.devices import count_gpus, usable_cores
from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.kubernetesconfig import KubernetesConfig, resolve_kubernetes
from dtrain.cluster.rundir import RunDir, read_jsonl
from dtrain.launcher.compose import LaunchConfig
from dtrain.launcher.topology import shape_nodes
from dtrain.runtime.config import RunConfig
from dtrain.runtime.scriptconfig import ScriptRunConfig
from dtrain.strategies.layout import check_layout


def make_plan(
    config: LaunchConfig, *, job_id: str, argv: Sequence[str], cwd: str, python: str = sys.executable
) -> JobPlan:
    """Modules are found beside the config first, then in `cwd`, beside the files that the config extends, and last in
    the environment of `python`."""
    ports = config.cluster.port_range
    shape = shape_nodes(config.cluster, gpus=count_gpus(), cores=usable_cores())
    fewer_nodes, why_not_fewer = _fewer_nodes(config, shape.procs_per_node)
    return JobPlan(
        name=config.name,
        run_dir=config.run_dir,
        job_id=job_id,
        backend=config.cluster.backend,
        nodes=config.cluster.nodes,
        procs_per_node=shape.procs_per_node,
        gpus_per_node=shape.gpus_per_node,
        cpus_per_node=shape.cpus_per_node,
        threads_per_proc=shape.threads_per_proc,
        python=nodes_python(config.cluster, python),
        argv=tuple(argv),
        cwd=os.path.abspath(cwd),
        sys_path=tuple(dict.fromkeys((os.path.dirname(config.path), os.path.abspath(cwd), *config.folders))),
        env=dict(config.cluster.env),
        checkpoint_url=config.content.checkpoint.url,
        workers=_workers(config.content),
        max_restarts_without_progress=config.content.recovery.max_restarts_without_progress,
        setup=config.cluster.setup,
        secrets=config.cluster.secrets,
        interface=config.cluster.interface,
        port_range=None if ports is None else (ports[0], ports[1]),
        fewer_nodes=fewer_nodes,
        why_not_fewer=why_not_fewer,
        config=config.path,
        overrides=config.overrides,
        slurm=config.cluster.slurm,
        container=config.cluster.container,
        ray=config.cluster.ray,
        hosts=_hosts(config.cluster),
        ssh_options=config.cluster.ssh.options,
        kubernetes=_kubernetes(config),
        kind="script" if isinstance(config.content, ScriptRunConfig) else "model",
    )


def _hosts(cluster: ClusterConfig) -> tuple[str, ...]:
    return tuple(host.name for host in cluster.ssh.read_hosts()) if cluster.backend == "ssh" else ()


def _kubernetes(config: LaunchConfig) -> KubernetesConfig:
    asked = config.cluster.kubernetes
    if config.cluster.backend != "kubernetes":
        return asked
    events = read_jsonl(RunDir(config.run_dir).events)
    saves = (float(event.get("seconds", 0.0)) for event in events if event.get("type") == "checkpoint_committed")
    return resolve_kubernetes(asked, max(saves, default=0.0))


def _fewer_nodes(config: LaunchConfig, procs_per_node: int) -> tuple[tuple[int, ...], str]:
    """With how many nodes the run may go on where some are lost, and why not with one less."""
    nodes, strategy = config.cluster.nodes, config.strategy
    if isinstance(config.content, ScriptRunConfig):
        return (), "a script's ranks are as many as it was started with"
    problems = {number: check_layout(strategy, number, procs_per_node) for number in range(1, nodes)}
    why = "; ".join(f"{key}: {message}" for key, message in problems.get(nodes - 1, ()))
    return tuple(number for number, found in problems.items() if not found), why


def _workers(run: RunConfig | ScriptRunConfig) -> Literal["warm", "exec"]:
    """A script may expect a process in which nothing has been imported yet."""
    if run.recovery.workers != "auto":
        return run.recovery.workers
    return "exec" if isinstance(run, ScriptRunConfig) else "warm"


def nodes_python(cluster: ClusterConfig, submitting: str = sys.executable) -> str:
    """The interpreter on the nodes. A name without a slash is for each node's PATH to find, as in a pod's image."""
    own = "python3" if cluster.backend == "kubernetes" else submitting
    asked = own if cluster.python == "auto" else cluster.python
    # not realpath: a virtual environment is known by its link
    return os.path.abspath(asked) if "/" in asked else asked
