"""The script of a Slurm job as text: golden files, what bash makes of it, and that nothing in a config is code there.

DTRAIN_WRITE_GOLDEN=1 writes the golden files anew: read the difference before it is committed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import debian
import pytest

from dtrain.cluster import exits
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.cluster.slurmconfig import ContainerConfig, SlurmConfig
from dtrain.cluster.version import VERSION
from dtrain.slurm.hostlist import compress
from dtrain.slurm.options import directive, log_pattern
from dtrain.slurm.script import batch_command, render_by_hand, render_script

GOLDEN = Path(__file__).parent / "assets" / "golden" / "slurm"
RUN = "/work/ada/runs/bytes-gpt"
PLAN = JobPlan(
    name="bytes-gpt",
    run_dir=RUN,
    job_id="slurm-20261122-101530-1a2b",
    backend="slurm",
    nodes=1,
    procs_per_node=1,
    gpus_per_node=0,
    threads_per_proc=0,
    python="/env/bin/python",
    argv=("dtrain", "launch", "cfg.yaml"),
    cwd="/home/ada",
    sys_path=("/home/ada",),
    env={"NCCL_DEBUG": "WARN"},
    checkpoint_url=f"{RUN}/checkpoints",
    workers="warm",
    max_restarts_without_progress=3,
    config="/home/ada/cfg.yaml",
)
EVERYTHING = SlurmConfig(
    partition="gpu,long", account="lab", qos="high", time="1-12:00:00", gpus_per_node="a100:4", mem="250G",
    constraint="ib&(rack1|rack2)", nodelist="gpu[1-4]", exclude="gpu07", reservation="friday",
    dependency="afterok:17?afterany:18", signal="B:USR1@300", no_kill=True, on_stop="resubmit",
    sbatch={
        "mail-type": "END,FAIL", "exclusive": True, "comment": 'a "b" \\ $(c) # d', "gres": "tmpfs:1T", "nice": False,
    },
)  # fmt: skip
SHAPES = {
    "plain": PLAN,
    "cpus": replace(PLAN, nodes=4, procs_per_node=2, cpus_per_node=16, overrides=("train.steps=10", "cluster.nodes=4")),
    "everything": replace(PLAN, nodes=4, procs_per_node=4, gpus_per_node=4, cpus_per_node=64, slurm=EVERYTHING),
    "setup": replace(PLAN, nodes=2, setup=("module load cuda", "source ~/env/bin/activate"), python="python3"),
    "gpus-of-sbatch": replace(PLAN, gpus_per_node=2, slurm=SlurmConfig(sbatch={"gpus-per-task": "2"}, on_stop="none")),
}
# One of everything that bash, sbatch or a format string gives a meaning to.
HOSTILE = [
    "two words", "it's", 'say "hi"', "a\nb", "back\\slash", "\\n", "$HOME", "$(touch /tmp/owned)", "`id`",
    "x; rm -rf ~", "a,b", "a:b", "é ü 日本", "-rf", "--wrap=x", "%j %%", "!!", "*", "~", "#", "|&<>(){}[]",
    " lead", "trail ", "\t",
]  # fmt: skip


def render(plan: JobPlan) -> str:
    return render_script(plan, batch_command(plan))


def header(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


BY_HAND = {"by-hand": SHAPES["cpus"], "by-hand-setup": replace(SHAPES["setup"], slurm=EVERYTHING)}
TEXTS = {
    **{shape: render(plan) for shape, plan in SHAPES.items()},
    **{s: render_by_hand(p) for s, p in BY_HAND.items()},
}


@pytest.mark.parametrize("shape", TEXTS)
def test_golden(shape: str) -> None:
    text = TEXTS[shape].replace(f"dtrain_version={VERSION}\n", "dtrain_version=VERSION\n")
    path = GOLDEN / f"{shape}.sbatch"
    if os.environ.get("DTRAIN_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("shape", TEXTS)
def test_bash_reads_it(shape: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(TEXTS[shape])
    said = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")


@pytest.mark.slow
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    try:
        debian.install("shellcheck", ("shellcheck",), ("shellcheck",))
    except debian.Missing as missing:
        pytest.skip(str(missing))
    for shape, text in TEXTS.items():
        (tmp_path / f"{shape}.sbatch").write_text(text)
    said = subprocess.run(
        ["shellcheck", "--exclude=SC1090", *sorted(tmp_path.glob("*.sbatch"))], capture_output=True, text=True
    )  # SC1090: a file that a user's setup line names can't be followed
    assert said.stdout == ""
    assert said.returncode == 0


def test_equal_plans_give_equal_text() -> None:
    assert render(SHAPES["everything"]) == render(replace(SHAPES["everything"]))
    assert JobPlan.from_json(SHAPES["everything"].to_json()) == SHAPES["everything"]


def test_every_option_is_as_old_as_20_11() -> None:
    """The text is the same for every version: nothing in it came later (sbatch(1) of 20.11)."""
    known = {
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gres", "gpus-per-task", "mem", "exclusive"),
        *("partition", "account", "qos", "time", "constraint", "nodelist", "exclude", "reservation", "dependency"),
        *("no-kill", "requeue", "no-requeue", "signal", "open-mode", "export", "mail-type", "comment"),
    }
    used = {option[2:].partition("=")[0] for plan in SHAPES.values() for option in header(render(plan))}
    assert used == known


@pytest.mark.parametrize("value", [value for value in HOSTILE if value.isprintable()])
def test_header_lines_say_what_was_meant(value: str) -> None:
    """By sbatch's own rules; tests/test_slurm_sbatch.py asks sbatch itself."""
    line = directive(f"--comment={value}")
    assert "\n" not in line
    assert _unquote(line.removeprefix("#SBATCH ")) == [f"--comment={value}"]


def _unquote(text: str) -> list[str]:
    """sbatch's: quotes of both kinds group, a backslash takes the next character anywhere, `#` ends the line."""
    words: list[str] = []
    word, quote, index = "", "", 0
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 1
            word += text[index : index + 1]
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            words, word = [*words, word], ""
        else:
            word += character
        index += 1
    return [part for part in [*words, word] if part]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that accepts the look at it, and prints what the script becomes, each word with a NUL behind it."""
    folder = tmp_path / 'it\'s a "$(folder)"; é\\'
    folder.mkdir()
    path = folder / "python"
    path.write_text('#!/bin/bash\n[[ "$1 $2" == *-c* ]] && exit 0\npwd\nprintf "%s\\0" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("evil", HOSTILE)
def test_words_arrive_unchanged(evil: str, python: Path, tmp_path: Path) -> None:
    cwd = tmp_path / evil.strip("~*").replace("/", "_") / "x"
    cwd.mkdir(parents=True)
    overrides = (f"model.text={evil}", f"{evil}=1", evil)
    plan = replace(PLAN, python=str(python), cwd=str(cwd), run_dir=str(cwd / "run"), overrides=overrides)
    ran = subprocess.run(["bash"], input=render(plan).encode(), capture_output=True, cwd="/", timeout=60)
    assert (ran.returncode, ran.stderr) == (0, b"")
    where, _, words = ran.stdout.decode().partition("\n-P\0")
    assert where == str(cwd)
    assert words.split("\0")[:-1] == list(batch_command(plan)[2:])
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize("evil", HOSTILE)
def test_words_of_sbatch_arrive_unchanged(evil: str, python: Path) -> None:
    config = f"/home/{evil}/cfg.yaml"
    text = render_by_hand(replace(PLAN, python=str(python), config=config))
    for given, words in (([], [config]), ([evil, f"a={evil}"], [evil, f"a={evil}"])):
        ran = subprocess.run(["bash", "-s", "--", *given], input=text.encode(), capture_output=True, timeout=60)
        assert ran.returncode == 0
        found = ran.stdout.decode().partition("-P\0")[2].split("\0")[:-1]
        assert found == ["-m", "dtrain.launcher.cli", "launch", "--batch", *words]


def test_a_python_by_hand_without_dtrain_is_said() -> None:
    ran = subprocess.run(
        ["bash"], input=render_by_hand(replace(PLAN, python="no-python")), capture_output=True, text=True
    )
    assert ran.returncode == exits.NEVER_RETRY
    assert "no-python can't import dtrain" in ran.stderr


def test_a_python_without_dtrain_ends_the_job_with_93(tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    plan = replace(PLAN, run_dir=str(tmp_path / "run"), cwd=str(tmp_path), python=false)
    by_hand = _run(plan)
    assert by_hand.returncode == exits.NEVER_RETRY
    assert false in by_hand.stderr
    assert not (tmp_path / "run").exists()
    control = RunDir(plan.run_dir).control(plan.job_id)
    control.path.mkdir(parents=True)
    assert _run(plan).returncode == exits.NEVER_RETRY
    ended = read_json(control.ended)
    assert ended is not None
    assert (ended["exit_code"], ended["state"]) == (exits.NEVER_RETRY, "failed")
    assert ended["reason"].startswith("job 17 (")


def test_a_setup_line_that_fails_is_named(tmp_path: Path) -> None:
    plan = replace(PLAN, cwd=str(tmp_path), python=sys.executable, setup=("true", "module load nothing 2>/dev/null"))
    ran = _run(plan)
    assert ran.returncode == exits.NEVER_RETRY
    assert "setup line 2, `module load nothing 2>/dev/null`, ended with 127" in ran.stderr


def _run(plan: JobPlan) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "SLURM_JOB_ID": "17"}
    return subprocess.run(["bash"], input=render(plan), capture_output=True, text=True, env=environ, timeout=60)


def test_no_secret_and_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-1234567890")
    text = render(replace(SHAPES["setup"], secrets=("WANDB_API_KEY",)))
    assert "canary" not in text
    assert "set -x" not in text
    assert "xtrace" not in text


def test_the_log_lies_in_the_run_directory() -> None:
    assert log_pattern("/runs/100%j") == "/runs/100%%j/slurm-%j.log"
    assert log_pattern("/runs/a\\b") == "/runs/a\\\\b/slurm.log"


def test_with_a_container_setup_is_for_inside_of_it() -> None:
    container = ContainerConfig(image="/images/torch.sif", runtime="apptainer")
    plan = replace(SHAPES["setup"], container=container)
    text = render(plan)
    assert "module load" not in text
    assert batch_command(plan)[0] == sys.executable
    assert JobPlan.from_json(plan.to_json()) == plan


def test_a_job_of_an_older_dtrain_is_read() -> None:
    old = PLAN.to_json()
    for key in ("slurm", "container", "cpus_per_node", "config", "overrides"):
        del old[key]
    assert JobPlan.from_json(old) == replace(PLAN, config="")


@pytest.mark.parametrize("names", ["ranges", "scattered"])
def test_a_thousand_nodes_render_quickly(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        f"gpu-{number:04}" if names == "ranges" else f"n{number * 7919 % 100000}-{number}" for number in range(1000)
    ]
    slurm = SlurmConfig(nodelist=",".join(nodes), exclude=",".join(f"x{name}" for name in nodes))
    plan = replace(PLAN, nodes=1000, procs_per_node=8, gpus_per_node=8, slurm=slurm)
    text = render(plan)

    def took_ms() -> float:
        began = time.process_time()
        render(plan)
        return 1000 * (time.process_time() - began)

    least_ms = min(took_ms() for _ in range(5))
    with capsys.disabled():
        print(f"\n{names}: 1,000 nodes rendered in {least_ms:.1f} ms")
    assert least_ms < 50
    assert f"--nodelist={compress(nodes)}" in text.replace('"', "")
