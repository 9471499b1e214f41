"""The process that imports torch while a launch is being checked, with small modules in the place of torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.zygote import Zygote, ZygoteError

MODULES = {
    "quick": "",
    "slow": "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n",
    "broken": "1 / 0\n",
    "errand": """
import gc, sys
def run(argument):
    print(*sorted({"quick", "slow"} & set(sys.modules)), f"gc={gc.isenabled()}", flush=True)
    return argument
""",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def plan(folder: Path) -> JobPlan:
    return JobPlan(
        name="toy", run_dir=str(folder / "run"), job_id="local-1", backend="local", nodes=1, procs_per_node=1,
        gpus_per_node=0, threads_per_proc=1, python=sys.executable, argv=(), cwd=str(folder), env={},
        sys_path=(), checkpoint_url="", workers="warm", max_restarts_without_progress=3,
    )  # fmt: skip


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    with Zygote(plan(tmp_path), preload=("quick", "slow")) as made:
        yield made


def errand(zygote: Zygote, said: Path, argument: int, *, early: bool) -> int:
    with open(said, "wb") as out:
        return zygote.fork("errand:run", argument, stdout=out.fileno(), stderr=2, environ={}, early=early)


def test_an_early_fork_does_not_wait_for_all_imports(zygote: Zygote, tmp_path: Path) -> None:
    early = errand(zygote, tmp_path / "early", 3, early=True)  # `slow` can't be done by now
    (tmp_path / "go").touch()
    later = errand(zygote, tmp_path / "later", 4, early=False)
    assert [zygote.wait(pid, 30) for pid in (early, later)] == [3, 4]
    assert (tmp_path / "early").read_text().split()[:-1] == ["quick"]
    assert (tmp_path / "later").read_text() == "quick slow gc=True\n"


def test_imports_that_fail_are_told_to_who_waits(tmp_path: Path) -> None:
    with Zygote(plan(tmp_path), preload=("quick", "broken")) as zygote, pytest.raises(ZygoteError, match="by zero"):
        zygote.wait_until_ready()
