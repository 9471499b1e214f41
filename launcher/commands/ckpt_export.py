"""`dtrain ckpt export`: a checkpoint's model as a folder that other tools open.

The work is done by a process of its own (runtime/export.py), which may need torch and the run's code; the folder
appears whole under its name or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.launcher.checkpoints import Place, add_where, add_which, choose, find_place
from dtrain.launcher.console import plural, size
from dtrain.launcher.screen import saying
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints

HELP = "write a checkpoint's model as a folder that transformers' from_pretrained opens, or as plain safetensors"
_MODULE = "dtrain.runtime.export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)
    parser.add_argument("folder", metavar="FOLDER", help="a new folder on this machine")
    parser.add_argument("--to", choices=("hf", "safetensors"), default="hf", help="default: hf")
    add_which(parser)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="round to this; left out: as it was saved")
    parser.add_argument(
        "--config", metavar="FOLDER", help="take config.json and a tokenizer from here; left out: the run's model's own"
    )


def run(args: argparse.Namespace) -> int:
    place = find_place(args.where)
    info = choose(place.storage, live_checkpoints(place.storage), args.step, args.attempt)
    folder = Path(args.folder).expanduser().absolute()
    _check(args, place, folder)
    with _arriving(folder) as arriving, saying(f"exporting step {info.step} ..."):
        answer = _export(args, place, info, arriving)
    _report(args, place, info, folder, answer)
    return exits.DONE


def _check(args: argparse.Namespace, place: Place, folder: Path) -> None:
    """Raises UsageError for what can be known before anything is read."""
    if "://" in args.folder:
        raise UsageError(f"{args.folder}: expects a folder on this machine, from where you may upload it.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists, and nothing is overwritten. Give another folder, or move it away.")
    if args.config is not None and not (Path(args.config) / "config.json").is_file():
        raise UsageError(f"--config {args.config}: there is no config.json in it.")
    if args.to == "hf" and args.config is None and (place.job is None or place.job.plan.kind != "model"):
        raise UsageError(
            f"--to hf: no run with a model is known here that wrote {place.storage.url} and could give a config. "
            "Name the run, give a folder with config.json (--config FOLDER), or take --to safetensors."
        )


@contextmanager
def _arriving(folder: Path) -> Iterator[Path]:
    """A folder beside the one to be, which takes its name at the end; an exception leaves nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        arriving = folder.with_name(f".{folder.name}.export-{os.getpid()}")
        arriving.mkdir()
    except OSError as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}. Give another folder.") from error
    try:
        yield arriving
        try:
            arriving.rename(folder)
        except OSError as error:
            raise UsageError(f"{folder} was made by somebody else meanwhile: {error.strerror}") from error
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def _export(args: argparse.Namespace, place: Place, info: CheckpointInfo, folder: Path) -> dict[str, Any]:
    """In the environment of the run, as far as it is known. Raises UsageError, CheckpointError."""
    plan = None if place.job is None else place.job.plan
    request = {
        "checkpoint_url": place.storage.url,
        "step": info.step,
        "attempt": info.attempt,
        "folder": str(folder),
        "form": args.to,
        "dtype": args.dtype,
        "config": None if args.config is None else os.path.abspath(args.config),
        "run_dir": plan.run_dir if plan is not None and plan.kind == "model" else None,
        "sys_path": [] if plan is None else plan.sys_path,
    }
    python = plan.python if plan is not None and os.access(plan.python, os.X_OK) else sys.executable
    cwd = plan.cwd if plan is not None and os.path.isdir(plan.cwd) else None
    environ = {**(plan.env if plan is not None else {}), **os.environ}
    child = subprocess.Popen(
        [python, "-P", "-m", _MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd, env=environ
    )
    try:
        output, _ = child.communicate(json.dumps(request).encode())
    finally:
        child.kill()
        child.wait()
    answer: dict[str, Any] = json.loads(output.splitlines()[-1]) if output.strip() else {}
    if not answer:
        raise CheckpointError(f"the process that exports ended with exit code {child.returncode}; it wrote no answer")
    if "problem" in answer:
        raise (UsageError if answer["exit_code"] == exits.USAGE else CheckpointError)(answer["problem"])
    return answer


def _report(args: argparse.Namespace, place: Place, info: CheckpointInfo, folder: Path, answer: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"step": info.step, "attempt": info.attempt, "folder": str(folder), **answer}))
        return
    weights = plural(sum(name.endswith(".safetensors") for name in answer["files"]), "file")
    print(f"Step {info.step} of {place.storage.url}")
    print(f"  {plural(answer['tensors'], 'tensor')}, {size(answer['bytes'])}, in {weights}: {folder}")
    if args.to == "hf":
        print(f"  open it:     transformers.AutoModel....from_pretrained({str(folder)!r})")
        print(f"  train on:    model: {{..., init_from: {folder}}}")
