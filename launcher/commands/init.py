"""`dtrain init`: a config and a module that train as they are, for a person to change piece by piece."""

from __future__ import annotations

import argparse
import keyword
import os
import re
import shlex
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.configfile import dump_yaml
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import write_once
from dtrain.launcher import starter
from dtrain.launcher.cli import program
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import make_plan
from dtrain.slurm.script import render_by_hand

HELP = """Writes a commented config and a small module that train as they are; with --slurm also a script for sbatch.
Overwrites nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", default="train", help="of the config; left out: train")
    parser.add_argument("--script", metavar="'FILE --FLAGS'", help="a config for a script that torchrun runs, instead")
    parser.add_argument(
        "--slurm", action="store_true", help="a script for sbatch as well; only that where the config is there already"
    )


def run(args: argparse.Namespace) -> int:
    config = Path(args.name if args.name.endswith((".yaml", ".yml")) else f"{args.name}.yaml")
    if not config.name.isprintable():
        raise UsageError(f"{args.name!r} has a control character in it. Choose another name.")
    batch = config.with_suffix(".sbatch")
    texts = _starter(config) if args.script is None else _script(config, args.script)
    if args.slurm and args.script is None and config.exists():
        texts = {}
    _refuse_taken([*texts, *([batch] if args.slurm else [])])
    config.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        _write(path, text)
    if args.slurm:
        _write(batch, _batch_script(config))
    command = shlex.join([*map(os.fspath, program()), "launch"])
    engine = " --backend slurm" if args.slurm else ""
    print(f"Wrote {' and '.join(map(str, [*texts, *([batch] if args.slurm else [])]))}. Next:")
    print(f"  {command}{engine} --dry-run {shlex.quote(str(config))}")
    print(f"  {command}{engine} {shlex.quote(str(config))}")
    if args.slurm:
        print(f"  sbatch {shlex.quote(str(batch))}        # does the same; edit its #SBATCH lines first")
    return exits.DONE


def _batch_script(config: Path) -> str:
    """Raises ConfigError: the config, a site's files with it, says what the job asks for."""
    loaded = load_config(config, backend="slurm")
    plan = make_plan(loaded, job_id="by-hand", argv=(), cwd=os.getcwd())
    return render_by_hand(plan)


def _write(path: Path, text: str) -> None:
    if not write_once(path, text):
        raise UsageError(f"{path} exists already, and init overwrites nothing. Choose another name.")


def _starter(config: Path) -> dict[Path, str]:
    module = config.with_name(f"{module_name(config.stem)}.py")
    return {
        config: starter.CONFIG.format(file=config.name, module=module.stem),
        module: starter.MODULE.format(file=config.name),
    }


def _script(config: Path, script: str) -> dict[Path, str]:
    return {config: starter.SCRIPT.format(file=config.name, script=dump_yaml(script, flow=True))}


def module_name(stem: str) -> str:
    """A name that Python can import, and that hides no module of the same name: my-run -> my_run_parts."""
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_")
    if not name or name[0].isdigit() or keyword.iskeyword(name):
        name = f"run_{name}".rstrip("_")
    return f"{name}_parts"


def _refuse_taken(paths: list[Path]) -> None:
    taken = [str(path) for path in paths if os.path.lexists(path)]
    if taken:
        verb = "exists" if len(taken) == 1 else "exist"
        raise UsageError(f"{' and '.join(taken)} {verb} already, and init overwrites nothing. Choose another name.")
    folder = paths[0].parent
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder.resolve()} is not writable. Change to another directory.")
