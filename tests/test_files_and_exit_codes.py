"""docs/files-and-exit-codes.md against the code: what scripts may rely on is there, all of it, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from dtrain.cluster import exits
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.launcher.commands import ckpt_ls, ckpt_show
from dtrain.launcher.runs import Job
from dtrain.launcher.state import ACTIVE, WORKER_KEYS, documented, read_status
from dtrain.runtime.checkpoint.attempts import CheckpointInfo
from dtrain.runtime.checkpoint.manifest import GridRule, Manifest, TensorInfo
from dtrain.runtime.checkpoint.scores import Scores, rank
from dtrain.runtime.checkpoint.survey import Surveyed
from dtrain.runtime.culprit import Failure
from dtrain.runtime.decide import State

REPO = Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "files-and-exit-codes.md").read_text()
CODE = [path for folder in ("launcher", "runtime", "slurm") for path in sorted((REPO / folder).rglob("*.py"))]


def tables(heading: str) -> list[list[list[str]]]:
    """The tables of a section, as rows of cells without their heads."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    found = re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n?)+)", section[1], re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()] for table in found]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def first_column(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in names(row[0])]


def test_exit_codes() -> None:
    codes = {value for name, value in vars(exits).items() if name.isupper()}
    assert {int(row[0].strip("| ")) for row in tables("Exit codes")[0]} == codes


@pytest.fixture
def status(tmp_path: Path) -> dict[str, Any]:
    plan = JobPlan(
        name="toy", run_dir=str(tmp_path), job_id="j", backend="local", nodes=1, procs_per_node=1, gpus_per_node=0,
        threads_per_proc=1, python="python", argv=(), cwd=str(tmp_path), sys_path=(), env={},
        checkpoint_url=str(tmp_path / "checkpoints"), workers="warm", max_restarts_without_progress=3,
    )  # fmt: skip
    return documented(read_status(Job(run=RunDir(tmp_path), plan=plan, submitted_at=0.0, steps=10)))


def test_status_keys(status: dict[str, Any]) -> None:
    keys = tables("status --json")[0]
    assert first_column(keys) == list(status)
    workers = next(row for row in keys if row[0].strip("| `") == "workers")
    assert tuple(names(workers[1])) == WORKER_KEYS


def test_states() -> None:
    assert set(first_column(tables("status --json")[1])) == ACTIVE | set(get_args(State)) | {"unknown"}


def test_failure_keys() -> None:
    keys = [field.name for field in dataclasses.fields(Failure)]
    assert sorted(first_column(tables("failure.json")[0])) == sorted(keys)


def test_event_types() -> None:
    call = re.compile(r"""(?:\b_?event|append_event)\(\s*(?:[\w.]+, )?"(\w+)"|"event": {"type": "(\w+)""")
    written = {name for path in CODE for match in call.finditer(path.read_text()) for name in match.groups() if name}
    assert set(first_column(tables("events.jsonl")[0])) == written


def test_ckpt_ls_keys(tmp_path: Path) -> None:
    info = CheckpointInfo(step=1, attempt=1, live=True, dir="step-00000001-a0001", committed_at=1.0)
    store = FileStorage(str(tmp_path))
    row = ckpt_ls.row(store, Surveyed(info=info, manifest=None, damages=()), rank([info], Scores(store)))
    assert sorted(first_column(tables("ckpt ls --json")[0])) == sorted(row)


def test_ckpt_show_keys(tmp_path: Path) -> None:
    info = CheckpointInfo(step=1, attempt=1, live=True, dir="step-00000001-a0001", committed_at=1.0)
    tensor = TensorInfo(dtype="F32", shape=(4,), layout=GridRule(parts=(1,), writers=((0, 1),)))
    manifest = Manifest(
        step=1, attempt=1, created_at=1.0, world_size=1, strategy={}, tensors={"model.w": tensor}, files=(), state={}
    )
    found = ckpt_show.record(FileStorage(str(tmp_path)), info, manifest)
    keys, of_tensors = tables("ckpt show --json")
    assert sorted(first_column(keys)) == sorted(found)
    assert sorted(first_column(of_tensors)) == sorted(found["tensors"][0])


def test_metrics_keys() -> None:
    source = (REPO / "runtime" / "trainer.py").read_text()
    keys = first_column(tables("metrics.jsonl")[0])
    assert [key for key in keys if f'"{key}"' not in source] == []
