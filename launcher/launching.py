"""What `dtrain launch` does: check everything, settle what happens to the run directory, submit, follow."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn

from dtrain.cluster import exits
from dtrain.cluster.backends import IN_ALLOCATION, get_backend
from dtrain.cluster.configfile import DEFAULT
from dtrain.cluster.errors import ConfigError, DtrainError, NodeError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.mirror import is_url
from dtrain.cluster.rundir import RunDir, refresh
from dtrain.cluster.zygote import Zygote, ZygoteError
from dtrain.launcher.bundle import Bundle
from dtrain.launcher.commands.status import view
from dtrain.launcher.compose import LaunchConfig, load_config
from dtrain.launcher.console import plural
from dtrain.launcher.follow import Bookmark, bookmark, follow
from dtrain.launcher.inside import fit
from dtrain.launcher.lease import Busy, confirm, launching
from dtrain.launcher.plan import make_plan
from dtrain.launcher.runs import Job, read_job
from dtrain.launcher.screen import make_screen, saying
from dtrain.launcher.state import read_status
from dtrain.launcher.storecheck import check_store
from dtrain.launcher.submit import Settled, gather_code, header, new_job_id, pack_code, record, settle, submit
from dtrain.launcher.targetcheck import look_at_targets
from dtrain.launcher.weightcheck import begins_with_weights, check_weights
from dtrain.runtime.codedir import unpack_code
from dtrain.slurm.jobenv import SlurmJob, slurm_job

_UNUSED = frozenset({"control", "code"})  # all that a launch has made when it is interrupted before it starts anything


def launch(args: argparse.Namespace) -> int:
    with ExitStack() as held:
        outcome = prepare(args, held)
        if isinstance(outcome, int):
            return outcome
        job, since = outcome
        if args.here:
            from dtrain.launcher.here import train_here

            return train_here(job, since)
        return _say_detached(job) if args.detach else follow(job, make_screen(job.steps), since)


def prepare(args: argparse.Namespace, held: ExitStack) -> int | tuple[Job, Bookmark]:
    """From the config to a job that is recorded, and submitted where it is not to run in this process; an exit code
    where there is nothing to do. `held`: what is to stay until this command ends."""
    first = _load(args, name=args.name, run_dir=args.run_dir)
    if first.chosen:
        print(f"cluster.backend: auto is {first.chosen}", file=sys.stderr)
    if args.here:
        if is_url(first.run_dir):
            raise UsageError(f"--here needs a folder as run_dir, found {first.run_dir}. Give one: --run-dir DIR")
        first = _as_one_rank(args, first)
    elif (allocation := _allocation(args, first)) is not None:
        first = _in_allocation(args, first, allocation)
    plan = _plan(args, first)
    if args.dry_run:
        refresh(RunDir(plan.run_dir).path)
    else:
        check_store(first)
    if (settled := _known_by_its_files(args, first, plan)) is not None:
        return _say_nothing_to_do(args, plan, settled)
    if not (args.dry_run or args.here or args.batch):
        get_backend(plan.backend).check(plan)
    with ExitStack() as preloaded:
        # It imports torch while everything is being checked; should nothing come of it, it goes without a trace.
        zygote = None if args.here or args.dry_run else get_backend(plan.backend).preload(plan)
        if zygote is not None:
            preloaded.enter_context(zygote)
        return _submit(args, first, plan, zygote, held)


def _submit(
    args: argparse.Namespace, first: LaunchConfig, plan: JobPlan, zygote: Zygote | None, held: ExitStack
) -> int | tuple[Job, Bookmark]:
    """An exit code where nothing is to be followed, else the job, and from where on its files tell of it."""
    try:
        with saying(f"{plan.name}: checking the config's targets ..."):
            checked = look_at_targets(first, plan.python, plan.sys_path, zygote=zygote)
            problems = list(checked.problems)
            if begins_with_weights(first) and (args.fresh or not _goes_on(args, first, plan)):
                problems += check_weights(first)
    except KeyboardInterrupt:
        return _say_interrupted(plan)
    if problems:
        raise ConfigError(problems)
    code = None if args.here else gather_code(first, plan, checked.modules)
    with ExitStack() as lease:
        config, plan, settled = _claim(args, first, lease)
        if settled.decision.action in ("refuse", "done"):
            return _say_nothing_to_do(args, plan, settled)
        if args.dry_run:
            return _dry_run(plan, settled, code)
        since = bookmark(RunDir(plan.run_dir))
        if code is not None:
            plan = pack_code(plan, code)
        if zygote is not None:
            try:
                _prepare_nodes(plan, zygote, held)
            except KeyboardInterrupt:
                return _say_interrupted(plan)
        confirm(RunDir(plan.run_dir), plan.job_id)
        job = record(config, plan)
        print("\n".join(header(plan, settled, code)), flush=True)
        if not (args.here or args.batch):
            submit(job, zygote)
    return job, since


def _prepare_nodes(plan: JobPlan, zygote: Zygote, held: ExitStack) -> None:
    """Unpacks the code for the nodes, which are on this machine, while their imports are still under way. What goes
    wrong here, the nodes will find and tell."""
    with contextlib.suppress(NodeError):
        if (code := unpack_code(plan)) is not None:
            held.callback(code.held.close)
    with saying(f"{plan.name}: importing torch ..."), contextlib.suppress(ZygoteError):
        zygote.wait_until_ready()


def _say_interrupted(plan: JobPlan) -> int:
    print(f"{plan.name}: interrupted, nothing was started", file=sys.stderr)
    return exits.DETACHED


def _as_one_rank(args: argparse.Namespace, asked: LaunchConfig) -> LaunchConfig:
    """With --here the cluster's shape does not count, here and in every later look at the config."""
    plan = _plan(args, asked)
    if plan.world_size == 1 and plan.backend == "local":
        return asked
    shape = f"{plural(plan.nodes, 'node')} x {plural(plan.procs_per_node, 'process')} on {plan.backend}"
    print(f"--here: one rank in this process, though the config asks for {shape}", file=sys.stderr)
    args.nodes, args.backend, args.overrides = 1, "local", [*args.overrides, "cluster.procs_per_node=1"]
    return _load(args, name=args.name, run_dir=args.run_dir)


def _allocation(args: argparse.Namespace, asked: LaunchConfig) -> SlurmJob | None:
    """The Slurm allocation that the nodes are to be started in, where there is one and nothing else is asked for."""
    wanted = asked.cluster.backend == "slurm" or asked.origins["cluster.backend"] == DEFAULT
    return slurm_job(os.environ) if wanted and not (args.submit or args.batch) else None


def _in_allocation(args: argparse.Namespace, asked: LaunchConfig, allocation: SlurmJob) -> LaunchConfig:
    """The config with the allocation's shape, here and in every later look at it."""
    from dtrain.slurm.allocation import as_it_is

    fitted = fit(asked.cluster, asked.origins, as_it_is(allocation), whole=False)
    args.nodes, args.backend, args.overrides = fitted.nodes, "slurm", [*args.overrides, *fitted.overrides]
    args.allocation = allocation
    return _load(args, name=args.name, run_dir=args.run_dir)


def _known_by_its_files(args: argparse.Namespace, config: LaunchConfig, plan: JobPlan) -> Settled | None:
    """A run that is done or alive, which needs no look at the targets. What else speaks against the launch is said
    after that look, so that all problems of a config come at once."""
    if args.fresh:
        return None
    with contextlib.suppress(UsageError):
        settled = _settle(args, config, plan)
        return settled if settled.decision.final else None
    return None


def _goes_on(args: argparse.Namespace, config: LaunchConfig, plan: JobPlan) -> bool:
    """Whether there is a checkpoint, so that the weights to begin with are not needed. What else is wrong with the
    run's places is said later."""
    with contextlib.suppress(DtrainError):
        return _settle(args, config, plan).checkpoint is not None
    return True


def _say_nothing_to_do(args: argparse.Namespace, plan: JobPlan, settled: Settled) -> int:
    """Raises UsageError where the launch is refused."""
    if settled.decision.action == "refuse":
        _refuse(args, plan, settled)
    print(f"{plan.name}: {' '.join(settled.decision.lines)}\n  run dir      {plan.run_dir}")
    return exits.DONE


def _refuse(args: argparse.Namespace, plan: JobPlan, settled: Settled) -> NoReturn:
    there = read_job(plan.run_dir)
    if there is not None:
        print("\n".join(view(read_status(there), None, now=time.time())), flush=True)
        if not args.dry_run:
            there.backend.hasten(there.plan)  # whoever launches it again wants it to run
    raise UsageError(f"{plan.run_dir}: " + "\n".join(settled.decision.lines))


def _load(args: argparse.Namespace, *, name: str | None, run_dir: str | None) -> LaunchConfig:
    return load_config(args.config, args.overrides, nodes=args.nodes, backend=args.backend, name=name, run_dir=run_dir)


def _plan(args: argparse.Namespace, config: LaunchConfig) -> JobPlan:
    job_id = new_job_id("here" if args.here else config.cluster.backend)
    plan = make_plan(config, job_id=job_id, argv=args.argv, cwd=os.getcwd())
    return plan if args.allocation is None else replace(plan, backend=IN_ALLOCATION)


def _claim(args: argparse.Namespace, first: LaunchConfig, lease: ExitStack) -> tuple[LaunchConfig, JobPlan, Settled]:
    """Settles the launch under the lease of its run directory; a dry run looks without one, so as to touch nothing.
    With --fresh the first free directory of DIR, DIR-2, DIR-3, ..."""
    for number in itertools.count(1):
        config = (
            first if number == 1 else _load(args, name=f"{first.name}-{number}", run_dir=f"{first.run_dir}-{number}")
        )
        if args.fresh and _is_taken(config):
            continue
        plan = _plan(args, config)
        if args.dry_run:
            return config, plan, _settle(args, config, plan)
        _refuse_before_touching(args, config, plan)
        try:
            lease.enter_context(launching(RunDir(plan.run_dir), plan.job_id))
        except Busy:
            if args.fresh:
                continue
            raise
        if not (args.fresh and _is_taken(config)):
            return config, plan, _settle(args, config, plan)
        lease.close()  # another --fresh was quicker
    raise AssertionError("there is always a next number")


def _settle(args: argparse.Namespace, config: LaunchConfig, plan: JobPlan) -> Settled:
    return settle(config, plan, fresh=args.fresh, continue_changed=args.continue_changed)


def _refuse_before_touching(args: argparse.Namespace, config: LaunchConfig, plan: JobPlan) -> None:
    """The lease makes a directory: what would be refused anyway is refused before that."""
    if not RunDir(plan.run_dir).job.exists():
        _settle(args, config, plan)


def _is_taken(config: LaunchConfig) -> bool:
    run = RunDir(config.run_dir)
    if is_url(run.place):
        return read_job(run.place) is not None
    path = run.path
    return run.job.exists() or (path.is_dir() and any(entry.name not in _UNUSED for entry in path.iterdir()))


def _dry_run(plan: JobPlan, settled: Settled, code: Bundle | None) -> int:
    said = [f"# {line}" for words in header(plan, settled, code) for line in words.splitlines()]
    print("\n".join(below_interpreter(said, get_backend(plan.backend).render(plan))))
    return exits.DONE


def below_interpreter(comments: Sequence[str], artefact: str) -> list[str]:
    """What sbatch or a shell takes must begin with its `#!` line."""
    lines = artefact.split("\n")
    first = 1 if lines[0].startswith("#!") else 0
    return [*lines[:first], *comments, *lines[first:]]


def _say_detached(job: Job) -> int:
    called = job.backend.called(job.plan)
    number = f" ({called})" if called else ""
    print(f"  job          {job.plan.job_id}{number}, follow it: dtrain attach {job.plan.name}")
    return exits.DONE
