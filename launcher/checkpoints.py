"""Which store and which checkpoint a person means on the command line of `dtrain ckpt`. Torch-free."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.cluster.storage import IMPATIENT_RETRY_S, Storage, folder_of, open_storage
from dtrain.launcher.runs import Job, known_jobs, read_job, resolve
from dtrain.launcher.state import derive, gather
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, newest_live
from dtrain.runtime.checkpoint.scores import find_best


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A store, and the run that writes to it where one is known here."""

    storage: Storage
    job: Job | None

    def is_over(self) -> bool:
        """Whether it is known that no process of the run is alive."""
        return self.job is not None and derive(gather(self.job)).is_over


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where", metavar="URL|RUN", help="a checkpoint URL or path, or a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=_step, metavar="N", help="which step, or best; left out: the newest live one")
    parser.add_argument("--attempt", type=int, metavar="A", help="by which attempt; left out: the live one")


def _step(text: str) -> int | Literal["best"]:
    try:
        return "best" if text == "best" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expects a step (100) or best, found "{text}"') from None


def find_place(where: str) -> Place:
    """The store that a person means: a URL, a run, or a directory that holds checkpoints. Raises UsageError."""
    if "://" in where:
        storage = open_storage(where, retry_s=IMPATIENT_RETRY_S)
        if storage.stat("job.json") is not None and (job := read_job(where)) is not None:
            return Place(storage=open_storage(job.plan.checkpoint_url, retry_s=IMPATIENT_RETRY_S), job=job)
        return Place(storage=storage, job=_writer_of(where))
    path = Path(where).expanduser()
    if path.is_dir():
        job = read_job(path)
        if job is not None:
            return Place(storage=open_storage(job.plan.checkpoint_url, retry_s=IMPATIENT_RETRY_S), job=job)
        url = str(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        return Place(storage=open_storage(url, retry_s=IMPATIENT_RETRY_S), job=_writer_of(url))
    try:
        job, remark = resolve(where, Path.cwd())
    except UsageError as error:
        raise UsageError(f"{error} Nor is {where} a directory of checkpoints.") from None
    if remark:
        print(f"dtrain: {remark}", file=sys.stderr)
    return Place(storage=open_storage(job.plan.checkpoint_url, retry_s=IMPATIENT_RETRY_S), job=job)


def choose(
    storage: Storage, infos: Sequence[CheckpointInfo], step: int | Literal["best"] | None, attempt: int | None
) -> CheckpointInfo:
    """The live one that was asked for; a dead one where step and attempt name it. Raises CheckpointError."""
    if step == "best":
        return find_best(storage)
    fitting = [info for info in infos if step in (None, info.step) and attempt in (None, info.attempt)]
    chosen = newest_live(fitting) or max(
        (info for info in fitting if step is not None), key=lambda info: info.attempt, default=None
    )
    if chosen is not None:
        return chosen
    asked = " ".join(
        [
            *([f"of step {step}"] if step is not None else []),
            *([f"by attempt {attempt}"] if attempt is not None else []),
        ]
    )
    steps = ", ".join(f"{info.step} (attempt {info.attempt})" for info in infos) or "none"
    raise CheckpointError(
        f"no {'live ' if step is None else ''}checkpoint {asked or 'at all'} in {storage.url}. "
        f"Committed steps: {steps}."
    )


def _writer_of(url: str) -> Job | None:
    """The known run whose checkpoints lie there; a run directory is found beside its checkpoints too."""
    plain = _plain(url)
    beside = read_job(os.path.dirname(plain)) if plain.startswith("/") else None
    jobs = [*([beside] if beside is not None else []), *known_jobs(Path.cwd())]
    return next((job for job in jobs if _plain(job.plan.checkpoint_url) == plain), None)


def _plain(url: str) -> str:
    """One spelling for one place: an absolute path for files."""
    folder = folder_of(url)
    return url.rstrip("/") if folder is None else os.path.abspath(folder)
