"""Whole runs on a real Slurm of four nodes: by launch and by plain sbatch, as root and as an ordinary user; nothing
that a person writes is changed on its way, and no secret is left anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from ordinary import python_of
from slurmcluster import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LIMIT_S = 240.0

# Each worker writes down what reached it, and waits in its first sample until it may go on.
TOY = """
import json, os, sys, time, torch
class Net(torch.nn.Module):
    def __init__(self, text=""):
        super().__init__()
        self.line = torch.nn.Linear(8, 8)
        self.last = torch.nn.Linear(8, 1)
        slurm = sorted(name for name in os.environ if name.startswith(("SLURM_", "SRUN_", "PMI")))
        seen = {"text": text, "environ": dict(os.environ), "slurm": slurm, "host": os.uname().nodename}
        with open(f"seen-{os.environ['RANK']}.json", "w") as file:
            json.dump({**seen, "argv": sys.argv, "name": os.environ["DTRAIN_NAME"]}, file)
        for name in ("CANARY_ENV", "CANARY_FILE"):
            print("told", os.environ.get(name), file=sys.stderr, flush=True)
    def forward(self, x):
        return self.last(torch.tanh(self.line(x)))
class Data(torch.utils.data.Dataset):
    def __init__(self, wait=False, pause=0.0): self.wait, self.pause = wait, pause
    def __len__(self): return 96
    def __getitem__(self, i):
        while self.wait and not os.path.exists("go"): time.sleep(0.05)
        time.sleep(self.pause)
        x = torch.linspace(0, 1, 8) * (i + 1) / 96
        return x, (x * x).sum(0, keepdim=True)
def loss(output, batch): return ((output - batch[1]) ** 2).mean()
"""
CONFIG = """
model: {_target_: toy.Net}
loss: toy.loss
data: {train: {_target_: toy.Data}, batch_size: 16}
optimizer: {_target_: torch.optim.AdamW, lr: 0.01}
train: {steps: 12}
cluster: {interface: auto}
"""

HOSTILE = [
    "two  words ", "it's", 'say "hi"', "back\\slash\\", "$HOME $(touch owned) `id`", "a,b;c|d&e", "line\nbreak\n",
    "é ü 日本 \U0001f600", "-x", "--fresh", "%j %t %%", "=x", "# no comment", "!history", "~", "{a,b}*?[c]", "\t",
]  # fmt: skip
HOSTILE_TEXT = "|".join(HOSTILE)


class Desk:
    """Somebody at the login node: a folder, and dtrain there."""

    def __init__(self, slurm: SlurmCluster, folder: Path, python: Path, user: str | None) -> None:
        self.slurm, self.folder, self.python, self.user = slurm, folder, python, user
        (folder / "toy.py").write_text(TOY)
        (folder / "toy.yaml").write_text(CONFIG)

    def start(self, *words: str, env: dict[str, str] | None = None) -> Popen:
        """A dry run's artefact is alone on standard output."""
        argv, environ, _ = self.slurm.command(*self.dtrain(*words), as_user=self.user)
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            argv, cwd=self.folder, env={**environ, **own, **(env or {})}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "--dry-run" in words else subprocess.STDOUT,
        )  # fmt: skip

    def dtrain(self, *words: str) -> list[str]:
        return [str(self.python), "-P", "-m", "dtrain.launcher.cli", *words]

    def run(self, *words: str) -> str:
        return finish(self.start(*words))

    def seen(self, ranks: int) -> list[dict[str, object]]:
        return [json.loads((self.folder / f"seen-{rank}.json").read_text()) for rank in range(ranks)]

    def losses(self, run: str) -> str:
        """SHA-256 of the float32 values, as they are written."""
        lines = (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        values = [(line["step"], line["loss"]) for line in map(json.loads, lines)]
        assert [step for step, _ in values] == list(range(1, 13))
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


Popen = subprocess.Popen[str]


@pytest.fixture
def root_desk(slurm: SlurmCluster, tmp_path: Path) -> Desk:
    return Desk(slurm, tmp_path, Path(sys.executable), None)


@pytest.fixture
def desk(slurm: SlurmCluster, root_desk: Desk) -> Desk:
    """An ordinary user's, in whose home all is his own; root's where nobody else may read this checkout."""
    python = python_of(slurm, "nobody")
    if python is None:
        return root_desk
    made = Desk(slurm, slurm.home("nobody"), python, "nobody")
    slurm.run("chown", "-R", "nobody", str(made.folder))
    return made


def test_launch_and_plain_sbatch_give_the_numbers_of_one_machine(root_desk: Desk) -> None:
    """Four ranks each: on this machine, by launch on four nodes, and by the script of `init --slurm`. A second job on
    a live run directory ends with 93 and names the first."""
    desk, slurm = root_desk, root_desk.slurm
    desk.run("launch", "--backend", "local", "--nodes", "4", "--name", "here", "toy.yaml")
    said = desk.run("launch", "--backend", "slurm", "--nodes", "4", "--name", "there", "toy.yaml")
    assert "there: 4 nodes x 1 process, CPU, slurm" in said
    assert [seen["host"] for seen in desk.seen(4)] == slurm.nodes
    assert [seen["environ"]["HOSTNAME"] for seen in desk.seen(4)] == slurm.nodes  # type: ignore[index]
    kept = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NAME", "SLURM_CONF"}
    place = re.compile(r"SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS|STEP|GTIDS|TASKS_PER_NODE|CPU_BIND|DIST)|SRUN_|PMI")
    for seen in desk.seen(4):
        names = set(map(str, seen["slurm"]))  # type: ignore[call-overload]
        assert kept <= names
        assert not [name for name in names if place.match(name)]
    desk.run("init", "--slurm", "toy")
    job = slurm_job(desk, "--nodes=4", "toy.sbatch", "toy.yaml", "name=byhand", "data.train.wait=true")
    until(lambda: (desk.folder / "runs" / "byhand" / "job.json").exists())
    second = slurm_job(desk, "toy.sbatch", "toy.yaml", "name=byhand", "data.train.wait=true")
    assert slurm.wait_job(second, "COMPLETED", "FAILED", timeout_s=LIMIT_S)["ExitCode"] == "93:0"
    assert f"(Slurm job {job}) is" in (desk.folder / f"slurm-{second}.out").read_text()
    (desk.folder / "go").touch()
    slurm.wait_job(job, "COMPLETED", timeout_s=LIMIT_S)
    assert desk.losses("here") == desk.losses("there") == desk.losses("byhand")


def slurm_job(desk: Desk, *words: str) -> int:
    """sbatch, from the desk's folder."""
    environ = {**os.environ, **desk.slurm.environ(), "OMP_NUM_THREADS": "1"}
    argv = ["sbatch", "--parsable", *words]
    return int(subprocess.run(argv, cwd=desk.folder, env=environ, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("way", ["launch", "the dry run's script"])
def test_hostile_values_arrive_unchanged(desk: Desk, way: str) -> None:
    """In a file's name, the run directory, overrides, environment and setup lines, by an ordinary user."""
    folder = desk.folder / 'it\'s a $(touch owned) "q" 日本, %j\\x'
    folder.mkdir()
    config = folder / "-cfg,ü.yaml"
    config.write_text((desk.folder / "toy.yaml").read_text())
    run_dir = folder / "runs %t\nof ' me"
    setup = f"export FROM_SETUP={shlex.quote(HOSTILE_TEXT)}"
    desk.slurm.run("chown", "-R", "nobody", str(folder))
    text, line = (json.dumps(value, ensure_ascii=False) for value in (HOSTILE_TEXT, setup))
    words = [
        "launch", "--backend", "slurm", "--nodes", "2", "--run-dir", str(run_dir), str(config), f"model.text={text}",
        f"cluster.env.HOSTILE={text}", f"cluster.setup=[{line}]", "train.steps=2",
    ]  # fmt: skip
    if way == "launch":
        desk.run(*words, "--name", "odd.name_1-x")
    else:
        (desk.folder / "saved.sbatch").write_text(desk.run(*words, "--name", "odd.name_1-x", "--dry-run"))
        job = desk.slurm.submit("saved.sbatch", as_user=desk.user)
        state = desk.slurm.wait_job(job, "COMPLETED", "FAILED", timeout_s=LIMIT_S)
        assert state["JobState"] == "COMPLETED", sorted(desk.folder.rglob("*.out"))
    for seen in desk.seen(2):
        environ = seen["environ"]
        assert isinstance(environ, dict)
        assert seen["text"] == environ["HOSTILE"] == environ["FROM_SETUP"] == HOSTILE_TEXT
        assert (seen["name"], environ["DTRAIN_RUN_DIR"]) == ("odd.name_1-x", str(run_dir))
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(desk.slurm.root.rglob("owned"))


def test_no_secret_is_left_anywhere(desk: Desk) -> None:
    """Looked for while the job runs and afterwards, in every form, everywhere: in what Slurm says of the job and keeps,
    in command lines, scripts, logs, the run directory. Slurm's own copy of an exported variable is the one exception,
    and root's alone."""
    slurm = desk.slurm
    by_env, by_file = (f"c4n4ry {kind}/+?&= {os.urandom(6).hex()}" for kind in ("exported", "filed"))
    token = (Path.home() if desk.user is None else desk.folder) / ".token"
    token.write_text(by_file + "\n")
    token.chmod(0o600)
    slurm.run("chown", desk.user or "root", str(token))
    secrets = 'cluster.secrets=[CANARY_ENV, "CANARY_FILE=file:~/.token"]'
    words = ["launch", "--backend", "slurm", "--nodes", "2", "toy.yaml", secrets, "data.train.wait=true"]
    exported = {"CANARY_ENV": by_env}
    said = finish(desk.start(*words, "--dry-run", env=exported))
    process = desk.start(*words, env=exported)
    until((desk.folder / "seen-1.json").exists)
    assert [(seen["environ"]["CANARY_ENV"], seen["environ"]["CANARY_FILE"]) for seen in desk.seen(2)] == [  # type: ignore[index]
        (by_env, by_file)
    ] * 2
    for path in desk.folder.glob("seen-*.json"):
        path.unlink()  # written by the test's own model
    (number,) = slurm.jobs()
    said += command_lines()
    for question in (
        ["scontrol", "show", "job", "-dd", str(number)], ["scontrol", "-o", "show", "step"],
        ["squeue", "-a", "-o", "%all"], ["scontrol", "write", "batch_script", str(number), "-"],
    ):  # fmt: skip
        said += slurm.run(*question).stdout
    said += desk.run("status", "toy", "--json")
    keeping = files_with(slurm.root, forms(by_env))
    kept_by_slurm = [path for path in keeping if path.is_relative_to(slurm.root / "state")]
    assert keeping == kept_by_slurm
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in kept_by_slurm)
    tokens = [token] if token.is_relative_to(slurm.root) else []
    assert files_with(slurm.root, forms(by_file)) == tokens
    (desk.folder / "go").touch()
    said += finish(process)
    assert files_with(slurm.root / "home", forms(by_env)) == []
    assert files_with(slurm.root / "log", [*forms(by_env), *forms(by_file)]) == []
    assert files_with(slurm.root / "home", forms(by_file)) == tokens
    log = (desk.folder / "runs" / "toy" / "logs" / "a0001" / "node-1.log").read_text()
    assert "told [CANARY_ENV]" in log
    assert "told [CANARY_FILE]" in log
    assert not [form for form in [*forms(by_env), *forms(by_file)] if form in said.encode(errors="surrogateescape")]


def finish(process: Popen) -> str:
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    return said


def forms(secret: str) -> list[bytes]:
    """As it is, as in a URL or in JSON, and in base64 wherever it begins in what was encoded."""
    raw = secret.encode()
    shifted = [base64.b64encode(b"\0" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, quote(secret, safe="").encode(), quote(secret).encode(), raw[-12:], *shifted]


def files_with(folder: Path, needles: Sequence[bytes]) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and ".venv" not in path.parts:
            raw = path.read_bytes()
            if any(needle in raw for needle in needles):
                found.append(path)
    return found


def command_lines() -> str:
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append("\0".join(process.cmdline()))
        except psutil.Error:
            continue
    return "\n".join(lines)


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
