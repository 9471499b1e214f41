"""LaunchConfig -> JobPlan: every `auto` of the cluster section decided. Starts and writes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Literal

from dtrain.cluster.devices import count_gpus, usable_cores
from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.launcher.compose import LaunchConfig
from dtrain.launcher.topology import shape_nodes
from dtrain.runtime.config import RunConfig
from dtrain.runtime.scriptconfig import ScriptRunConfig


def make_plan(
    config: LaunchConfig, *, job_id: str, argv: Sequence[str], cwd: str, python: str = sys.executable
) -> JobPlan:
    """Modules are found from the config's own directory first, then from `cwd`, then in the environment of `python`."""
    ports = config.cluster.port_range
    shape = shape_nodes(config.cluster, gpus=count_gpus(), cores=usable_cores())
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
        sys_path=tuple(dict.fromkeys((os.path.dirname(config.path), os.path.abspath(cwd)))),
        env=dict(config.cluster.env),
        checkpoint_url=config.content.checkpoint.url,
        workers=_workers(config.content),
        max_restarts_without_progress=config.content.recovery.max_restarts_without_progress,
        setup=config.cluster.setup,
        secrets=config.cluster.secrets,
        interface=config.cluster.interface,
        port_range=None if ports is None else (ports[0], ports[1]),
        config=config.path,
        overrides=config.overrides,
        slurm=config.cluster.slurm,
        container=config.cluster.container,
        kind="script" if isinstance(config.content, ScriptRunConfig) else "model",
    )


def _workers(run: RunConfig | ScriptRunConfig) -> Literal["warm", "exec"]:
    """A script may expect a process in which nothing has been imported yet."""
    if run.recovery.workers != "auto":
        return run.recovery.workers
    return "exec" if isinstance(run, ScriptRunConfig) else "warm"


def nodes_python(cluster: ClusterConfig, submitting: str = sys.executable) -> str:
    """The interpreter on the nodes. A name without a slash is for each node's PATH to find."""
    asked = submitting if cluster.python == "auto" else cluster.python
    # not realpath: a virtual environment is known by its link
    return os.path.abspath(asked) if "/" in asked else asked
