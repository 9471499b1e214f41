"""Runs a strategy and one process for a few steps on this machine, through the local back end and its agents as any
run, in run directories of their own that are gone afterwards. What they recorded is judged by runtime/verify."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.backends import Backend, get_backend
from dtrain.cluster.configfile import dump_yaml
from dtrain.cluster.devices import usable_cores
from dtrain.cluster.errors import ConfigError, DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.cluster.zygote import Zygote
from dtrain.launcher.compose import LaunchConfig, dump_resolved, load_config
from dtrain.launcher.plan import make_plan
from dtrain.launcher.screen import saying
from dtrain.launcher.submit import new_job_id
from dtrain.launcher.targetcheck import look_at_targets
from dtrain.runtime.scriptconfig import ScriptRunConfig
from dtrain.runtime.verify.judge import judge
from dtrain.runtime.verify.records import RECORDS, Orders
from dtrain.runtime.verify.verdict import Verdict
from dtrain.strategies.config import StrategyConfig

_ENTRY = "dtrain.runtime.verify.worker:main"
_POLL_S = 0.1
_MOST_RANKS_A_CORE = 4


class RunFailed(DtrainError):
    """One of the runs did not come to its end, so there is nothing to compare."""

    exit_code = exits.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A strategy to try, with the config that it runs under."""

    words: str  # "fsdp, replicate 2"
    config: LaunchConfig
    plan: JobPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    asked: Asked
    verdict: Verdict


def verify(
    path: str, overrides: Sequence[str], strategies: Sequence[str], *, steps: int, argv: Sequence[str]
) -> Iterator[Answer]:
    """`strategies`: values of `strategy`; none: the config's own. Raises UsageError, ConfigError, RunFailed."""
    with _workplace() as folder:
        asked = [
            _ask(path, overrides, value, folder / f"strategy-{n}", argv) for n, value in enumerate(strategies or [""])
        ]
        one = _one_process(path, overrides, folder / "one", asked[0].plan, argv)
        steps = min(steps, one.config.run.train.steps)
        backend = get_backend("local", ("--entry", _ENTRY))
        with _preloaded(backend, asked[0].plan) as zygote:
            with saying("checking the config's targets ..."):
                found = look_at_targets(asked[0].config, one.plan.python, one.plan.sys_path, zygote=zygote)
            if found.problems:
                raise ConfigError(found.problems)
            for each in asked:
                with saying(f"{each.words} on {each.plan.world_size} ranks: {steps} steps ..."):
                    _run(backend, each, Orders(steps=steps, strategies=None), zygote)
            records = tuple(str(Path(each.plan.run_dir) / RECORDS) for each in asked)
            with saying(f"one process: {steps} steps ..."):
                _run(backend, one, Orders(steps=steps, strategies=records), zygote)
        for number, each in enumerate(asked):
            train = one.config.run.train
            yield Answer(asked=each, verdict=judge(Path(each.plan.run_dir), Path(one.plan.run_dir), number, train))


@contextmanager
def _workplace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dtrain-verify-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _preloaded(backend: Backend, plan: JobPlan) -> Iterator[Zygote | None]:
    """All of the runs are forks of one process that has imported torch, where that can be."""
    zygote = backend.preload(plan)
    if zygote is None:
        yield None
        return
    with zygote:
        yield zygote


def _ask(path: str, overrides: Sequence[str], strategy: str, run_dir: Path, argv: Sequence[str]) -> Asked:
    words = [*overrides, *_strategy_words(strategy)] if strategy else list(overrides)
    config = _load(path, words, run_dir)
    plan = make_plan(config, job_id=new_job_id("verify"), argv=argv, cwd=os.getcwd())
    shape = f"{plan.nodes} x {plan.procs_per_node}"
    if plan.world_size == 1:
        raise UsageError(
            f"verify: {shape} is one rank, so there is nothing to compare. For example: cluster.procs_per_node=2"
        )
    if plan.world_size > (most := _MOST_RANKS_A_CORE * max(2, usable_cores())) and not plan.gpus_per_node:
        raise UsageError(
            f"verify: runs on this machine alone, and {shape} = {plan.world_size} ranks are more than its "
            f"{usable_cores()} cores bear ({most}). Set cluster.nodes and cluster.procs_per_node lower: "
            "2 to 4 ranks show what many do"
        )
    return Asked(words=_in_words(config.strategy), config=config, plan=plan)


def _one_process(path: str, overrides: Sequence[str], run_dir: Path, like: JobPlan, argv: Sequence[str]) -> Asked:
    gpus = min(1, like.gpus_per_node)
    shape = ("cluster.nodes=1", "cluster.procs_per_node=1", f"cluster.gpus_per_node={gpus}")
    config = _load(path, [*overrides, *_strategy_words("single"), *shape], run_dir)
    plan = make_plan(config, job_id=new_job_id("verify"), argv=argv, cwd=os.getcwd())
    return Asked(words="single", config=config, plan=plan)


def _load(path: str, words: Sequence[str], run_dir: Path) -> LaunchConfig:
    """The config, on this machine and with nothing of it left behind."""
    own = (
        f"checkpoint.url={dump_yaml(str(run_dir / 'checkpoints'), flow=True)}",
        "recovery.max_restarts_without_progress=0",
    )
    first = load_config(path, words, backend="local", run_dir=str(run_dir))
    if isinstance(first.content, ScriptRunConfig):
        raise UsageError(f"verify: {path} runs a script, whose steps are its own. It needs a config with a model")
    return load_config(path, [*words, *own, "track=[]"], backend="local", run_dir=str(run_dir))


def _strategy_words(strategy: str) -> list[str]:
    """What was asked for, all other keys at their defaults: none of the config's own degrees stays. But for `wrap`,
    which says what the units of the model are."""
    defaults = {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in dataclasses.fields(StrategyConfig)
        if f.name not in ("name", "wrap") and f.default is not dataclasses.MISSING
    }
    return [
        *(f"strategy.{name}={dump_yaml(value, flow=True)}" for name, value in defaults.items()),
        f"strategy={strategy}",
    ]


def _in_words(strategy: StrategyConfig) -> str:
    """ "fsdp, replicate 2": the name and what differs from the defaults."""
    fields = [field for field in dataclasses.fields(strategy) if field.name != "name"]
    set_ones = [(f.name, getattr(strategy, f.name)) for f in fields if getattr(strategy, f.name) != f.default]
    return ", ".join([strategy.name, *(f"{name} {value}" for name, value in set_ones)])


def _run(backend: Backend, asked: Asked, orders: Orders, zygote: Zygote | None) -> None:
    """To its end. Raises RunFailed with what the ranks said."""
    run = RunDir(asked.plan.run_dir)
    control = run.control(asked.plan.job_id)
    control.path.mkdir(mode=0o700, parents=True)
    write_atomic(control.token, secrets.token_hex(32), 0o600)
    write_atomic(run.config, dump_resolved(asked.config))
    write_atomic(run.job, json.dumps({**asked.plan.to_json(), "submitted_at": time.time(), "steps": orders.steps}))
    orders.write(run.path)
    try:
        backend.submit(asked.plan, zygote)
        while (ended := read_json(control.ended)) is None and backend.state(asked.plan) != "gone":
            time.sleep(_POLL_S)
        ended = ended or read_json(control.ended) or {}
    finally:
        backend.kill(asked.plan)
    if ended.get("state") != "done":
        raise RunFailed(f"verify: {asked.words} on {asked.plan.world_size} ranks: {_failure(run, ended)}")


def _failure(run: RunDir, ended: dict[str, Any]) -> str:
    failure = read_json(run.failure)
    if failure is None:
        return str(ended.get("reason") or "its nodes ended without a word")
    where = f" ({failure['where']})" if failure.get("where") else ""
    return f"rank {failure['global_rank']}: {failure['message']}{where}"
