"""From a settled config to a submitted job: what is written into the run directory, in which order, and what a person
is told first. The processes themselves are the back end's."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.configfile import DEFAULT
from dtrain.cluster.errors import ConfigError, Problem, UnclearError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetesconfig import is_on_volume
from dtrain.cluster.mirror import is_url
from dtrain.cluster.rundir import RunDir, append_event, publish, put_end, read_jsonl, write_atomic, write_once
from dtrain.cluster.secretrefs import parse_secrets
from dtrain.cluster.storage import folder_of
from dtrain.cluster.zygote import Zygote
from dtrain.launcher import labels
from dtrain.launcher.bundle import Bundle, Module, collect, describe_bundle, over_limit
from dtrain.launcher.compose import LaunchConfig, diff_identity, dump_resolved
from dtrain.launcher.console import plural
from dtrain.launcher.identity import Decision, Existing, decide
from dtrain.launcher.pack import pack
from dtrain.launcher.runs import Job, describe_checkpoint, newest_checkpoint, read_job
from dtrain.launcher.state import read_status
from dtrain.runtime.checkpoint.attempts import CheckpointInfo
from dtrain.slurm.container import has_own_python

ALIVE = frozenset({"pending", "running", "stopping", "requeued", "unknown"})  # refused for that
OURS = frozenset({"control", "checkpoints", "logs", "code"})  # folders that a run directory may have without a job


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A launch whose fate on its run directory is decided."""

    decision: Decision
    checkpoint: CheckpointInfo | None  # the newest live one of the store


def new_job_id(prefix: str) -> str:
    """Like local-20261122-101530-1a2b: sorts by time, safe in file names."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def settle(config: LaunchConfig, plan: JobPlan, *, fresh: bool, continue_changed: bool) -> Settled:
    """Reads only. Raises UsageError where the directory or the checkpoints belong to something else."""
    run = RunDir(plan.run_dir)
    refuse_foreign(run)
    checkpoint = newest_checkpoint(plan.checkpoint_url)
    if fresh and checkpoint is not None:
        raise UsageError(
            f"--fresh: {plan.checkpoint_url} already holds step {checkpoint.step} of another run, which this one would "
            "continue. Put ${run_dir} or ${name} into checkpoint.url, or give another."
        )
    existing = _existing(config, run)
    if existing is not None and existing.state not in ALIVE and checkpoint is None:
        _refuse_lost_checkpoints(run, plan.checkpoint_url)
    step = None if checkpoint is None else checkpoint.step
    return Settled(
        decision=decide(existing, steps_asked=config.steps, checkpoint_step=step, continue_changed=continue_changed),
        checkpoint=checkpoint,
    )


def _refuse_lost_checkpoints(run: RunDir, url: str) -> None:
    """A run that has committed a step must not begin anew because a disk is not mounted or somebody tidied up."""
    steps = [int(event.get("step", 0)) for event in read_jsonl(run.events) if event["type"] == "checkpoint_committed"]
    if steps:
        raise UsageError(
            f"checkpoint.url: this run has committed step {max(steps)}, but {url} holds no checkpoint. Is it the right "
            f"disk, and is it mounted? To train from the beginning: --fresh, or remove {run.path}"
        )


def refuse_foreign(run: RunDir) -> None:
    """A directory with somebody's files in it is no place for a run: config.yaml there may be the person's own."""
    if run.job.exists() or is_url(run.place) or not run.path.is_dir():
        return
    foreign = sorted(entry.name for entry in run.path.iterdir() if entry.name not in OURS)
    if foreign and not (run.path / "control").is_dir():
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UsageError(f"run_dir: {run.path} is no run, but has files in it ({shown}). Choose a new directory.")


def _existing(config: LaunchConfig, run: RunDir) -> Existing | None:
    import yaml

    job = read_job(run.place)
    if job is None:
        return None
    status = read_status(job, look_for_checkpoint=False)
    try:
        old = yaml.safe_load(run.config.read_text())
    except FileNotFoundError:
        old = config.resolved  # the launch before died before it wrote anything that could differ
    identity_lines, other_lines = diff_identity(old, config.resolved)
    return Existing(
        job_id=job.plan.job_id,
        state=status["state"],
        step=int(status["step"] or 0),
        stopped_early="" if identity_lines else _stopped_early(status, job.steps, other_lines),
        identity_lines=tuple(identity_lines),
        other_lines=tuple(other_lines),
    )


def _stopped_early(status: dict[str, Any], steps: int | None, differs: list[str]) -> str:
    """The reason of a run that is done before its last step; empty where another rule of train.early_stop is asked for
    now, by which it may go on."""
    if status["state"] != "done" or steps is None or status["step"] >= steps:
        return ""
    return "" if any(line.startswith("train.early_stop") for line in differs) else str(status["reason"])


def header(plan: JobPlan, settled: Settled, code: Bundle | None = None) -> list[str]:
    """The first lines that a person sees: what, where, and from which step."""
    device = f"{plural(plan.gpus_per_node, 'GPU')} a node" if plan.gpus_per_node else "CPU"
    shape = f"{plural(plan.nodes, 'node')} x {plural(plan.procs_per_node, 'process')}, {device}, {plan.backend}"
    shape += _machines(plan)
    lines = [
        f"{plan.name}: {shape}",
        f"  run dir      {plan.run_dir}",
        f"  checkpoints  {plan.checkpoint_url}",
        f"  {_origin(plan, settled)}",
    ]
    if code is not None:
        lines.append(f"  code         {describe_bundle(code)}")
    if plan.setup:
        count = plural(len(plan.setup), "line")
        lines.append(
            f"  setup        {count} of bash on each node; so nodes start anew, not as forks of a warmed-up process"
        )
    return lines + [f"  {line}" for line in settled.decision.lines]


def _machines(plan: JobPlan) -> str:
    """The machines that the launch has chosen, like " (node1, node2; spare: node9)"; "" where an engine does that."""
    if not plan.hosts:
        return ""
    spare = plan.hosts[plan.nodes :]
    return f" ({_first(plan.hosts[: plan.nodes])}{f'; spare: {_first(spare)}' if spare else ''})"


def _first(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _origin(plan: JobPlan, settled: Settled) -> str:
    found = settled.checkpoint
    if found is not None:
        return f"continues from step {found.step} ({describe_checkpoint(plan.checkpoint_url, found)})"
    nothing = "" if settled.decision.action == "start" else ": no checkpoint was committed"
    return f"starts from the beginning{nothing}"


def gather_code(config: LaunchConfig, plan: JobPlan, modules: Sequence[Module]) -> Bundle | None:
    """The code that the nodes are to run; None where they use it as it lies. Raises ConfigError for too much of it."""
    asked = config.cluster.code
    unseen = has_own_python(plan.container, plan.python)  # so it is not known what the targets import
    if asked == "live" or (asked == "auto" and ((plan.kind == "script" and _is_seen(plan)) or unseen)):
        return None
    scripts = (module.folder for module in modules if plan.kind == "script")
    elsewhere = (module.folder for module in modules if not _has(plan, module.folder))  # found by PYTHONPATH, say
    places = list(dict.fromkeys([*plan.sys_path, *scripts, *elsewhere]))
    never = [plan.run_dir, *_secret_files(plan)]
    if (folder := folder_of(plan.checkpoint_url)) is not None:
        never.append(folder)
    bundle = collect(places, modules, exclude=never)
    if message := over_limit(bundle, config.cluster.bundle_limit_mb):
        key = "cluster.bundle_limit_mb"
        place = config.origins[key]
        where = os.path.relpath(config.path) if place == DEFAULT else place
        raise ConfigError([Problem(where=where, key=key, message=message)])
    return bundle if bundle.trees else None


def _is_seen(plan: JobPlan) -> bool:
    """Whether the nodes have the code as it lies."""
    return all(_has(plan, folder) for folder in plan.sys_path)


def _has(plan: JobPlan, folder: str) -> bool:
    """Whether the nodes have this machine's folder. Pods have those that they mount."""
    return plan.backend != "kubernetes" or is_on_volume(plan.kubernetes, folder)


def _secret_files(plan: JobPlan) -> list[str]:
    files = [secret.file for secret in parse_secrets(plan.secrets) if secret.file is not None]
    return [str(path) for file in files for path in (file, file.resolve())]


def pack_code(plan: JobPlan, code: Bundle) -> JobPlan:
    """Puts the archive into the run directory; the plan that has the nodes use it."""
    run = RunDir(plan.run_dir)
    digest = pack(code, run.path / "code")
    publish(run.code(digest))
    sys_path = tuple(dict.fromkeys([*plan.sys_path, *code.sys_path]))
    return replace(plan, code_digest=digest, code_roots=code.roots, sys_path=sys_path)


def record(config: LaunchConfig, plan: JobPlan) -> Job:
    """Writes everything that the nodes read, before anything is started. The caller holds the launch lease."""
    run = RunDir(plan.run_dir)
    submitted_at = round(time.time(), 3)
    extra = {
        "submitted_at": submitted_at,
        "steps": config.steps,
        "git_commit": git_commit(Path(plan.sys_path[0]) if plan.sys_path else Path(plan.cwd)),
    }
    control = run.control(plan.job_id)
    control.path.mkdir(mode=0o700, parents=True)
    if not write_once(control.token, secrets.token_hex(32), mode=0o600):
        raise UsageError(f"{control.path} exists already; launch again")
    write_atomic(run.config, dump_resolved(config))
    write_atomic(run.job, json.dumps({**plan.to_json(), **extra}, indent=2) + "\n")
    append_event(
        run, "submitted", job_id=plan.job_id, name=plan.name, backend=plan.backend, nodes=plan.nodes,
        world_size=plan.world_size, argv=list(plan.argv),
    )  # fmt: skip
    labels.remember(labels.Label(name=plan.name, run_dir=plan.run_dir, job_id=plan.job_id, submitted_at=submitted_at))
    return Job(run=run, plan=plan, submitted_at=submitted_at, steps=config.steps)


def submit(job: Job, zygote: Zygote | None) -> None:
    """Starts the job. A submission that fails half way leaves nothing running and says so in the run's records."""
    try:
        job.backend.submit(job.plan, zygote)
    except UnclearError:
        raise  # a scheduler may have it: its state says so as soon as that is known
    except BaseException as error:
        job.backend.kill(job.plan)
        end(job, state="failed", exit_code=exits.FAILED, reason=f"could not be submitted: {error}", step=0)
        raise


def end(job: Job, *, state: str, exit_code: int, reason: str, step: int) -> bool:
    """Writes how the job ended where no coordinator can; True if nobody had."""
    return put_end(job.run, job.control, state=state, exit_code=exit_code, reason=reason, step=step)


def git_commit(directory: Path) -> str | None:
    """The commit of the config's directory, `-dirty` behind it where tracked files differ; None outside of git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
