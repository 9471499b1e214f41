"""`dtrain launch` up to the moment of starting, and real runs through it: races, relaunch, --fresh, --here, Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.launcher import cli
from dtrain.launcher.lease import Busy, launching
from dtrain.launcher.runs import read_job

DTRAIN = [sys.executable, "-m", "dtrain.launcher.cli"]

# Torch-free targets keep the check of targets quick; the real ones learn y = 2x in a few milliseconds a step.
LIGHT = """
class Model:
    def __init__(self, width=1): pass
class Data:
    def __init__(self): pass
def opt(params, lr=0.1): pass
"""
REAL = """
import os, time, torch
class Model(torch.nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        return self.line(x)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        if os.path.exists("stop-here"):
            os.unlink("stop-here")
            breakpoint()
        x = torch.tensor([i / 64.0])
        return x, 2 * x
def loss(output, batch): return ((output - batch[1]) ** 2).mean()
opt = torch.optim.SGD
"""
CONFIG = """
model: {_target_: toy.Model, width: 1}
loss: LOSS
data: {train: {_target_: toy.Data}, batch_size: 8}
optimizer: {_target_: toy.opt, lr: 0.1}
train: {steps: 20}
checkpoint: {every: 5}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose targets are light; the working directory is tmp_path."""
    (tmp_path / "toy.py").write_text(LIGHT)
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG.replace("loss: LOSS\n", ""))
    return path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(REAL)
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG.replace("LOSS", "{_target_: toy.loss}"))
    return path


def launch(*words: str | Path) -> int:
    return cli.main(["launch", *map(str, words)])


def start(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environ", {})}
    return subprocess.Popen(
        [*DTRAIN, "launch", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, **options,
    )  # fmt: skip


def launch_on_a_terminal(*words: str | Path) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([*DTRAIN, "launch", *map(str, words)], stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the end of a pseudo terminal
        while chunk := os.read(ours, 65536):
            said += chunk
    os.close(ours)
    return process.wait(timeout=90), said.decode()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=800)[0]
    return process.returncode, said


def submitted(path: Path, config: Path, state: str, step: int = 20) -> RunDir:
    """A run directory as an earlier launch of `config` left it: written by a real launch whose nodes ended at once."""
    from dtrain.launcher.compose import load_config
    from dtrain.launcher.plan import make_plan
    from dtrain.launcher.submit import record

    loaded = load_config(config, run_dir=str(path))
    job = record(loaded, make_plan(loaded, job_id="local-1", argv=("dtrain", "launch"), cwd=str(config.parent)))
    ended = {"state": state, "exit_code": 0, "reason": "", "step": step, "at": 1.0}
    job.control.ended.write_text(json.dumps(ended))
    return job.run


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if "__pycache__" not in file.parts)


def test_dry_run_prints_the_artefact_and_touches_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    assert launch("--dry-run", "--nodes", "3", config) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "# toy: 3 nodes x 1 process, CPU, local"
    assert "#   starts from the beginning" in out
    assert out.count("dtrain.runtime.agent") == 3
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("stem", "name"),
    [("toy", "toy"), ("a--b_", "a--b_"), ("my toy (2)", "my-toy-2"), ("modèle größe", "modele-gro-e"), ("模型", "run")],
)
def test_a_files_stem_becomes_a_name(config: Path, stem: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", config.rename(config.with_name(f"{stem}.yaml"))) == 0
    assert capsys.readouterr().out.startswith(f"# {name}: ")


def test_all_problems_of_targets_at_once(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", config, "model.widht=3", "data.train._target_=toy.Dta") == 2
    words = capsys.readouterr().err
    assert "widht" in words
    assert "Dta" in words
    assert "2 problems; nothing was started." in words
    assert not (tmp_path / "runs").exists()


def test_a_record_of_a_submission(config: Path, tmp_path: Path) -> None:
    run = submitted(tmp_path / "r", config, "done")
    control = run.control("local-1")
    assert control.path.stat().st_mode & 0o777 == 0o700
    assert control.token.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(control.token.read_text())) == 32
    assert [event["type"] for event in read_jsonl(run.events)] == ["submitted"]
    job = read_json(run.job)
    assert job is not None
    assert job["steps"] == 20
    assert control.token.read_text() not in run.job.read_text() + run.config.read_text() + run.events.read_text()


@pytest.mark.slow
class TestRelaunch:
    def test_done_is_said_and_0(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        submitted(tmp_path / "runs" / "toy", config, "done")
        assert launch(config) == 0
        assert "done already: step 20" in capsys.readouterr().out

    def test_another_training_is_refused(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        submitted(tmp_path / "runs" / "toy", config, "stopped", step=5)
        before = names(tmp_path)
        assert launch(config, "model.width=2") == 2
        words = capsys.readouterr().err
        assert "model.width: 1 -> 2" in words
        assert "--continue-changed" in words
        assert [name for name in names(tmp_path) if name not in before] == ["runs/toy/control/launch.lock"]
        assert launch("--dry-run", "--continue-changed", config, "model.width=2") == 0

    def test_alive_is_refused_and_shown(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = submitted(tmp_path / "runs" / "toy", config, "done")
        control = run.control("local-1")
        control.ended.unlink()
        agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            control.node(0).write_text(json.dumps(ProcessId.of(agent.pid).to_json()))
            assert launch(config) == 2
        finally:
            agent.kill()
            agent.wait()
        said = capsys.readouterr()
        assert "toy: pending" in said.out
        assert "job local-1 is pending here" in said.err

    def test_fresh_takes_the_first_free_name(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        submitted(tmp_path / "runs" / "toy", config, "done")
        submitted(tmp_path / "runs" / "toy-2", config, "done")
        assert launch("--dry-run", "--fresh", config) == 0
        out = capsys.readouterr().out
        assert "# toy-3: " in out
        assert str(tmp_path / "runs" / "toy-3") in out

    def test_somebodys_folder_is_no_run_directory(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = names(tmp_path)
        assert launch("--run-dir", tmp_path, config) == 2
        assert "is no run, but has files in it (toy.py" in capsys.readouterr().err
        assert names(tmp_path) == before

    def test_one_launch_at_a_time(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "r")
        with (
            launching(run, "local-1"),
            pytest.raises(Busy, match="local-1 is being launched"),
            launching(run, "local-2"),
        ):
            pass
        with launching(run, "local-3"):
            pass

    def test_a_lock_that_a_killed_launch_left_to_its_child_for_a_moment_is_waited_for(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "r")
        with launching(run, "local-1"):
            (lock,) = (run.path / "control").glob("*.lock")
        with open(lock, "a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            child = subprocess.Popen(["sleep", "0.1"], pass_fds=(held.fileno(),))
        with launching(run, "local-2"):
            assert child.wait() == 0

    def test_here_is_one_rank_whatever_the_file_says(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config.write_text(config.read_text() + "cluster: {nodes: 2, procs_per_node: 3}\n")
        assert launch("--here", "--dry-run", config) == 0
        said = capsys.readouterr()
        assert "--here: one rank in this process, though the config asks for 2 nodes x 3 processes on local" in said.err
        assert "# toy: 1 node x 1 process" in said.out

    def test_done_and_alive_are_said_before_the_targets_are_imported(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = submitted(tmp_path / "runs" / "toy", config, "done")
        (tmp_path / "toy.py").write_text("open('imported', 'w').close()\n" + LIGHT)
        assert launch(config) == 0
        control = run.control("local-1")
        control.ended.unlink()
        control.node(0).write_text(json.dumps(ProcessId.of(os.getpid()).to_json()))
        assert launch(config) == 2
        assert "job local-1 is pending here" in capsys.readouterr().err
        assert not (tmp_path / "imported").exists()

    def test_another_training_is_refused_after_the_targets_problems(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        submitted(tmp_path / "runs" / "toy", config, "stopped", step=5)
        assert launch(config, "model.widht=2") == 2
        assert "widht, did you mean width?" in capsys.readouterr().err


def test_the_check_of_targets_is_told_on_a_terminal_and_wiped_out(config: Path) -> None:
    code, said = launch_on_a_terminal("--dry-run", config)
    words = "toy: checking the config's targets ..."
    assert code == 0, said
    assert said.startswith(words + "\r\x1b[2K"), said


@pytest.mark.slow
def test_ctrl_c_during_the_check_starts_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text("open('imported', 'w').close()\nimport time\ntime.sleep(60)\n" + LIGHT)
    process = start(config)
    assert process.stdout is not None
    assert process.stdout.readline() == "toy: checking the config's targets ...\n"  # after two seconds, no terminal
    while not (tmp_path / "imported").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert said == "toy: interrupted, nothing was started\n"
    assert not (tmp_path / "runs").exists()


SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo":
            time.sleep(60)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.e2e
def test_ctrl_c_during_the_imports_starts_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_IMPORT)
    process = start("--fresh", config, environ={"PYTHONPATH": str(tmp_path / "slow")})
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "toy: importing torch ...\n":
        assert "checking" in line
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert said == "toy: interrupted, nothing was started\n"
    assert read_job(tmp_path / "runs" / "toy") is None
    assert launch("--fresh", "--dry-run", config) == 0
    assert f"{tmp_path}/runs/toy\n" in capsys.readouterr().out  # not toy-2: nothing has used it


def ended(run: RunDir) -> dict[str, Any]:
    job = read_job(run.path)
    assert job is not None
    found = read_json(job.control.ended)
    assert found is not None
    return found


def cancel(path: Path) -> None:
    """Leaves nothing running whatever the test found."""
    subprocess.run([*DTRAIN, "cancel", str(path), "--grace", "30"], check=True, capture_output=True, timeout=800)


@pytest.mark.e2e
def test_of_launches_at_once_exactly_one_starts(real: Path, tmp_path: Path) -> None:
    processes = [start("--detach", real, "train.steps=100000") for _ in range(3)]
    try:
        results = [finish(process) for process in processes]
        assert sorted(code for code, _ in results) == [0, 2, 2], results
        job = read_job(tmp_path / "runs" / "toy")
        assert job is not None
        # A loser may also meet the other loser, which holds the lease while it is being refused.
        told = (job.plan.job_id, "is being launched here at this moment")
        assert all(any(words in said for words in told) for _, said in results), results
        assert len(list((tmp_path / "runs" / "toy" / "control").glob("local-*"))) == 1
    finally:
        cancel(tmp_path / "runs" / "toy")


@pytest.mark.e2e
def test_a_run_and_its_continuation(real: Path, tmp_path: Path) -> None:
    code, said = finish(start(real, "--nodes", "2"))
    assert code == 0, said
    lines = said.splitlines()
    assert "toy: 2 nodes x 1 process, CPU, local" in lines  # before it, the check of targets where that took a while
    assert "  starts from the beginning" in lines
    assert "checkpoint of step 15 committed" in said
    assert "done at step 20 of 20" in lines
    code, said = finish(start(real, "train.steps=30"))
    assert code == 0, said
    assert "  continues from step 20 (attempt 1: ddp on 2 ranks)" in said.splitlines()
    assert "  differs: train.steps: 20 -> 30" in said.splitlines()
    assert [record["step"] for record in read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")] == list(range(1, 31))


@pytest.mark.e2e
def test_ctrl_c_saves_and_the_printed_command_continues(real: Path, tmp_path: Path) -> None:
    process = start(real, "train.steps=40", environ={"SLOW_S": "0.1"})
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("checkpoint of step 5"):
            process.send_signal(signal.SIGINT)
            break
    code, rest = finish(process)
    said = "".join(seen) + rest
    assert code == 85, said
    run = RunDir(tmp_path / "runs" / "toy")
    assert ended(run)["state"] == "stopped"
    step = ended(run)["step"]
    assert 5 <= step < 40
    again = rest.rpartition("continue:")[2].strip()
    done = subprocess.run(again, shell=True, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continues from step {step} " in done.stdout
    assert [record["step"] for record in read_jsonl(run.metrics)] == list(range(1, 41))


@pytest.mark.e2e
def test_here_with_a_breakpoint_on_a_terminal(real: Path, tmp_path: Path) -> None:
    (tmp_path / "stop-here").touch()
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*DTRAIN, "launch", "--here", str(real)], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, answered, deadline = "", False, time.monotonic() + 90
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.2)[0]:
            continue
        try:
            said += os.read(ours, 65536).decode(errors="replace")
        except OSError:
            break
        if not answered and "(Pdb)" in said:
            answered = True
            os.write(ours, b"p 'i is', i\nc\n")
    os.close(ours)
    assert process.wait(timeout=90) == 0, said
    assert "'i is', " in said
    assert "done at step 20 of 20" in said
    assert ended(RunDir(tmp_path / "runs" / "toy"))["state"] == "done"


@pytest.mark.e2e
def test_here_ctrl_c_saves(real: Path, tmp_path: Path) -> None:
    process = start("--here", real, "train.steps=400", environ={"SLOW_S": "0.1"})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 85, said
    run = RunDir(tmp_path / "runs" / "toy")
    assert ended(run)["state"] == "stopped"
    assert f"stopped at step {ended(run)['step']} of 400: its state is saved" in said
