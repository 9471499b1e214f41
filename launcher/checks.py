"""What the sections of a config ask of each other and of this machine, found before anything starts. Changes nothing.

Each check gets only sections that were bound without a problem, so one mistake is not reported twice.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.cluster.errors import Problem, UsageError
from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.mirror import is_url
from dtrain.cluster.storage import folder_of, open_storage, scheme_of
from dtrain.launcher.console import plural
from dtrain.launcher.nodechecks import check_hosts, check_nodes, check_ray
from dtrain.launcher.pipelinechecks import check_callables, check_pipeline
from dtrain.launcher.podchecks import check_pods
from dtrain.launcher.topology import shape_nodes
from dtrain.runtime.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    Schedules,
    Target,
    TrainConfig,
)
from dtrain.runtime.modelconfig import ModelConfig
from dtrain.runtime.tracking.feed import PACKAGES
from dtrain.slurm.container import check_container
from dtrain.slurm.optionchecks import check_options
from dtrain.strategies.caps import CAPS, refused, refused_deferred
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.exactcheck import check_exact, check_fused
from dtrain.strategies.layout import check_layout

_MIN_FREE_BYTES = 1 << 20  # below that not even a run's logs have room

_AT_URL = ("kubernetes", "local")  # back ends
_SCHEMES = ("s3", "gs", "az", "file")
Found = Iterator[tuple[str, str]]  # key, message

# What an agent tells its workers (cluster/workerenv.py): a config that sets one would break the job.
_RESERVED = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
    )
)


def check_sections(values: Mapping[str, Any], where: Callable[[str], str], *, gpus: int, cores: int) -> list[Problem]:
    """`values`: the bound sections by key; `where(key)`: a key's place; `gpus` and `cores`: what this machine has."""

    def check_cluster(strategy: StrategyConfig, cluster: ClusterConfig) -> Found:
        return _cluster(strategy, cluster, gpus, cores)

    def check_computing(train: TrainConfig, strategy: StrategyConfig, cluster: ClusterConfig) -> Found:
        on_gpus = shape_nodes(cluster, gpus=gpus, cores=cores).gpus_per_node > 0
        return _computing(train, strategy, "cuda" if on_gpus else "cpu", nodes_here=cluster.backend == "local")

    def check_sums(train: TrainConfig, data: DataConfig, strategy: StrategyConfig, cluster: ClusterConfig) -> Found:
        if train.exact is not None:
            world_size = cluster.nodes * shape_nodes(cluster, gpus=gpus, cores=cores).procs_per_node
            yield from check_exact(
                strategy,
                train.exact.shards,
                world_size=world_size,
                batch_size=data.batch_size,
                compiled=train.compile,
            )

    def check_stages(strategy: StrategyConfig, train: TrainConfig, data: DataConfig, cluster: ClusterConfig) -> Found:
        shape = shape_nodes(cluster, gpus=gpus, cores=cores)
        return check_pipeline(strategy, train, data, cluster.nodes, shape.procs_per_node)

    checks: tuple[tuple[tuple[str, ...], Callable[..., Found]], ...] = (
        (("train", "data"), _batches),
        (("train", "schedule", "optimizer"), _schedules),
        (("train", "data", "metrics", "checkpoint"), _evaluations),
        (("data", "loss", "loss_closure", "metrics"), _closure),
        (("strategy", "cluster"), check_cluster),
        (("cluster",), check_nodes),
        (("cluster",), _engine),
        (("cluster", "run_dir", "checkpoint"), _container),
        (("train", "strategy", "cluster"), check_computing),
        (("strategy", "cluster"), _packages),
        (("train", "data", "strategy", "cluster"), check_sums),
        (("train", "optimizer"), _exact_optimizer),
        (("model", "strategy"), _deferred),
        (("strategy", "train", "data", "cluster"), check_stages),
        (("strategy", "loss_closure", "on_end"), check_callables),
        (("run_dir", "checkpoint"), _places),
        (("cluster", "run_dir"), _run_dir_at_url),
        (("track",), _trackers),
        (("track", "run_dir"), _trackers_at_url),
    )
    problems: list[Problem] = []
    for needed, check in checks:
        if all(key in values for key in needed):
            found = check(*(values[key] for key in needed))
            problems += [Problem(where=where(key), key=key, message=message) for key, message in found]
    return problems


def _batches(train: TrainConfig, data: DataConfig) -> Found:
    if train.micro_batch is not None and train.micro_batch > data.batch_size:
        yield (
            "train.micro_batch",
            f"{train.micro_batch} samples are more than data.batch_size {data.batch_size}, those of a whole step. "
            f"Set at most {data.batch_size}, or leave it out.",
        )
    if train.eval_every is not None and data.eval is None:
        yield "train.eval_every", "there is nothing to evaluate on: set data.eval, or leave it out."
    if train.clip_grad_norm == 0:
        yield "train.clip_grad_norm", "0 would clip every gradient to nothing. Leave it out for no clipping."


def _evaluations(train: TrainConfig, data: DataConfig, metrics: Target | None, checkpoint: CheckpointConfig) -> Found:
    if metrics is not None and data.eval is None:
        yield "metrics", "they are means over data.eval, which is not set. Set it, or leave metrics out."
    for key, rule in (("train.early_stop", train.early_stop), ("checkpoint.best", checkpoint.best)):
        if rule is None:
            continue
        if data.eval is None or train.eval_every is None:
            missing = "data.eval" if data.eval is None else "train.eval_every"
            yield key, f"looks at every evaluation, but {missing} is not set. Set it, or leave this out."
        if rule.metric != "loss" and metrics is None:
            yield f"{key}.metric", f"there is no metric {rule.metric}: set metrics, or take loss."


def _closure(data: DataConfig, loss: Target | None, closure: Target | None, metrics: Target | None) -> Found:
    if closure is None:
        return
    without = "Leave one of the two out."
    if loss is not None:
        yield "loss_closure", f"calls the model and gives the loss itself, so loss is never asked. {without}"
    if data.forward is not None:
        yield "loss_closure", f"calls the model itself, so data.forward is never asked. {without}"
    if metrics is not None:
        yield "metrics", f"needs the model's output, which loss_closure keeps to itself. {without}"


def _schedules(train: TrainConfig, schedule: Schedules | Target, optimizer: OptimizerConfig) -> Found:
    if not isinstance(schedule, Target):
        yield from _parts("schedule", schedule, train.steps)
    for number, group in enumerate(optimizer.groups):
        key = f"optimizer.groups.{number}.schedule"
        if group.schedule is not None and isinstance(schedule, Target):
            yield key, f"{schedule.target} sets the rates of all groups. Leave one of the two schedules out."
        elif group.schedule is not None:
            yield from _parts(key, group.schedule, train.steps)


def _parts(key: str, schedule: Schedules, steps: int) -> Found:
    """One schedule, or several of which one follows another."""
    if not isinstance(schedule, tuple):
        if schedule.steps is not None:
            yield f"{key}.steps", "belongs to a list of schedules; this one lasts for the whole run. Leave it out."
        yield from _schedule(key, schedule, steps, "train.steps")
        return
    if not schedule:
        yield key, "is an empty list. Leave it out for a constant rate."
        return
    left = steps
    for number, part in enumerate(schedule[:-1]):
        if part.steps is None:
            yield f"{key}.{number}.steps", "is required of all but the last: how many steps this schedule lasts."
            return
        yield from _schedule(f"{key}.{number}", part, part.steps, "its steps")
        left -= part.steps
    last = f"{key}.{len(schedule) - 1}"
    if left <= 0:
        yield last, f"never begins: those before it last {steps - left} steps, and train.steps is {steps}."
    elif schedule[-1].steps is not None:
        yield f"{last}.steps", f"the last one lasts for the {left} steps that are left. Leave it out."
    else:
        yield from _schedule(last, schedule[-1], left, "the steps that are left for it,")


def _schedule(key: str, schedule: ScheduleConfig, length: int, of_what: str) -> Found:
    steps = f"{of_what} {length}"
    if schedule.warmup > length:
        yield f"{key}.warmup", f"{schedule.warmup} steps are more than {steps}. Set fewer."
    if schedule.name == "wsd" and schedule.decay == 0:
        yield f"{key}.decay", f"wsd needs the number of its last steps. For example: decay: {max(1, length // 5)}"
    elif schedule.name != "wsd" and schedule.decay:
        yield f"{key}.decay", f"belongs to wsd; {schedule.name} decays by itself. Leave it out, or set name: wsd."
    elif schedule.warmup <= length < schedule.warmup + schedule.decay:
        both = f"warmup {schedule.warmup} + decay {schedule.decay} = {schedule.warmup + schedule.decay} steps"
        yield f"{key}.decay", f"{both}, but {steps}. Set fewer."


def _cluster(strategy: StrategyConfig, cluster: ClusterConfig, gpus: int, cores: int) -> Found:
    shape = shape_nodes(cluster, gpus=gpus, cores=cores)
    yield from check_layout(strategy, cluster.nodes, shape.procs_per_node)
    if 0 < shape.gpus_per_node < shape.procs_per_node:
        yield (
            "cluster.procs_per_node",
            f"{shape.procs_per_node} workers a node, but a GPU takes one and a node has {shape.gpus_per_node}. "
            f"Set {shape.gpus_per_node} or auto; to train on CPUs, {_without_gpus(cluster)}.",
        )
    share = gpus // cluster.nodes
    if cluster.backend == "local" and shape.gpus_per_node > share:
        yield (
            "cluster.gpus_per_node",
            f"{shape.gpus_per_node} on each of {plural(cluster.nodes, 'node')}, but this machine has {gpus} GPUs in "
            f"all. Set {share} or auto.",
        )
    for name in cluster.env:
        if name in _RESERVED or name.startswith("DTRAIN_"):
            yield f"cluster.env.{name}", "is set by dtrain for each worker. Leave it out."
        elif not name or "=" in name or "\0" in name:
            yield f"cluster.env.{name}", "is no name of an environment variable."


def _without_gpus(cluster: ClusterConfig) -> str:
    return "export CUDA_VISIBLE_DEVICES= (empty)" if cluster.backend == "local" else "ask for none"


def _engine(cluster: ClusterConfig) -> Found:
    """What only one back end knows how to do. What is set for another one is left alone: a site's file sets it."""
    if cluster.backend == "slurm":
        yield from check_options(cluster)
    if cluster.backend == "ssh":
        yield from check_hosts(cluster)
    if cluster.backend == "ray":
        yield from check_ray(cluster)
    if cluster.backend != "slurm" and cluster.container is not None:
        yield (
            "cluster.container",
            f"backend {cluster.backend} starts no containers. Leave it out, or set backend: slurm.",
        )


def _container(cluster: ClusterConfig, run_dir: str, checkpoint: CheckpointConfig) -> Found:
    if cluster.backend == "slurm":
        yield from check_container(cluster, run_dir, checkpoint.url)
    if cluster.backend == "kubernetes":
        yield from check_pods(cluster, run_dir, checkpoint.url)


def _trackers(track: tuple[str, ...]) -> Found:
    for index, name in enumerate(track):
        module, extra = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            yield f"track.{index}", f"{name} is not installed here. pip install 'dtrain[{extra}]', or leave it out."
        if name in track[:index]:
            yield f"track.{index}", f"{name} is there twice. Leave one out."


def _packages(strategy: StrategyConfig, cluster: ClusterConfig) -> Found:
    """Another Python on the nodes has packages of its own, and says so itself."""
    if strategy.name not in CAPS or cluster.python != "auto" or cluster.backend == "kubernetes":
        return
    for package in CAPS[strategy.name].needs:
        if importlib.util.find_spec(package.module) is None:
            yield "strategy", f"{strategy.name} needs {package.module}, which is not installed here. {package.install}"


def _deferred(model: ModelConfig, strategy: StrategyConfig) -> Found:
    if model.deferred_init and strategy.name in CAPS and (problem := refused_deferred(strategy, CAPS[strategy.name])):
        yield "model.deferred_init", problem


def _computing(train: TrainConfig, strategy: StrategyConfig, device_type: str, *, nodes_here: bool) -> Found:
    if strategy.name in CAPS:  # `auto` chooses one that can
        problems = refused(
            strategy.name,
            CAPS[strategy.name],
            device_type=device_type,
            precision=train.precision,
            checkpointing=train.activation_checkpointing != "none",
            compiled=train.compile,
            tensor=strategy.tensor,
        )
        yield from (("strategy", f"{problem}.") for problem in problems)
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it; the nodes are asked again
    if train.compile and nodes_here and device_type == "cpu" and shutil.which(compiler) is None:
        yield (
            "train.compile",
            f"needs a C++ compiler on a CPU, and {compiler} is not on this machine. Install it, set CXX, or set false.",
        )


def _exact_optimizer(train: TrainConfig, optimizer: OptimizerConfig) -> Found:
    if train.exact is None:
        return
    if problem := check_fused(optimizer.target.kwargs):
        yield "optimizer.fused", problem
    for number, group in enumerate(optimizer.groups):
        if problem := check_fused(group.settings):
            yield f"optimizer.groups.{number}.fused", problem


def _run_dir_at_url(cluster: ClusterConfig, run_dir: str) -> Found:
    """Who can do without a folder that all nodes share."""
    if not is_url(run_dir):
        return
    try:
        open_storage(run_dir)
    except UsageError as error:
        yield "run_dir", str(error)
        return
    if scheme_of(run_dir) not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        yield "run_dir", f"expects a folder, or a URL with one of {known}; found {run_dir}."
    if cluster.backend not in _AT_URL:
        yield (
            "run_dir",
            f"backend {cluster.backend} needs a folder that this machine and all nodes share, found {run_dir}. A URL "
            f"goes with {' and '.join(_AT_URL)}; checkpoints go to a URL with every backend: checkpoint.url.",
        )


def _trackers_at_url(track: Sequence[str], run_dir: str) -> Found:
    if is_url(run_dir) and "tensorboard" in track:
        yield "track", "tensorboard's files would stay on the nodes where run_dir is a URL. Take mlflow, or a folder."


def _places(run_dir: str, checkpoint: CheckpointConfig) -> Found:
    run_obstacle = "" if is_url(run_dir) else directory_obstacle(Path(run_dir))
    if run_obstacle:
        yield "run_dir", run_obstacle
    try:
        open_storage(checkpoint.url)
    except UsageError as error:
        yield "checkpoint.url", str(error).removeprefix("checkpoint.url: ")
        return
    if scheme_of(checkpoint.url) == "memory":
        yield (
            "checkpoint.url",
            "memory:// is seen by the process that writes it and no other. Choose another store.",
        )
    if (folder := folder_of(checkpoint.url)) is None:
        return
    path = Path(folder)
    if "://" not in checkpoint.url and (scheme := next((part for part in path.parts if part.endswith(":")), None)):
        yield (
            "checkpoint.url",
            f"{path} would be a folder. Did you mean {scheme}//...? A folder it is with file://{path}.",
        )
    if run_obstacle and path.is_relative_to(run_dir):
        return
    if obstacle := directory_obstacle(path):
        yield "checkpoint.url", obstacle


def directory_obstacle(path: Path) -> str:
    """Why `path` can't be made or used as a directory that we write to; "" where it can. Nothing is created."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file, and a directory is needed there. Choose another path, or move the file away."
    if not os.access(place, os.W_OK | os.X_OK):
        what = "is not writable" if place == path else f"cannot be made: {place} is not writable"
        return f"{path} {what}. Choose another path."
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < _MIN_FREE_BYTES:  # some network file systems tell no size at all
        return f"the disk of {place} is full ({free // 1024} KiB left). Free space there, or choose another path."
    return ""
