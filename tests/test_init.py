"""`dtrain init`: what it writes trains as it is, and nothing that exists is touched."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launcher.cli import main
from dtrain.launcher.commands.init import module_name

DTRAIN = Path(sys.executable).parent / "dtrain"


def dtrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DTRAIN, *words], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["train", "my run; rm -rf ~", "3d/torch"])
def test_what_it_writes_passes_and_trains(tmp_path: Path, name: str) -> None:
    """The dry run imports what the config names; that it learns does not depend on the name."""
    done = dtrain(tmp_path, "init", name)
    assert done.returncode == 0, done.stderr
    dry, real = (shlex.split(line) for line in done.stdout.splitlines()[1:])
    checked = subprocess.run(dry, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stderr
    if " " not in name:
        return
    trained = subprocess.run(real, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert losses[0] > 0.6
    assert losses[-1] < 0.2


@pytest.mark.e2e
def test_a_config_for_a_script(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("import os, sys\nprint('rank', os.environ['RANK'], sys.argv[1:])\n")
    done = dtrain(tmp_path, "init", "cfg", "--script", "hello.py --flag 'two words: #'")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cfg.yaml", "hello.py"]
    trained = dtrain(tmp_path, "launch", "cfg.yaml")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/cfg/logs/a0001/*.log"))
    assert logs.count("['--flag', 'two words: #']") == 2


@pytest.mark.parametrize("taken", ["cfg.yaml", "cfg_parts.py"])
def test_it_overwrites_nothing(
    tmp_path: Path, taken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken).write_text("mine")
    assert main(["init", "cfg"]) == 2
    assert f"{taken} exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_a_script_for_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "new", "--slurm"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("  sbatch new.sbatch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.sbatch", "new.yaml", "new_parts.py"]
    (tmp_path / "mine.yaml").write_text(
        "script: train.py\ncluster: {nodes: 3, setup: [module load x], slurm: {account: lab, time: 90}}\n"
    )
    (tmp_path / "train.py").write_text("")
    assert main(["init", "mine", "--slurm"]) == 0
    text = (tmp_path / "mine.sbatch").read_text()
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --account=lab",
        "#SBATCH --time=90",
        "##SBATCH --gres=gpu:4",
        "module load x",
    ):
        assert line in text.splitlines()
    assert "##SBATCH --account=NAME" not in text
    assert not (tmp_path / "mine_parts.py").exists()
    assert main(["init", "mine", "--slurm"]) == 2
    assert "mine.sbatch exists already" in capsys.readouterr().err
    assert (tmp_path / "mine.sbatch").read_text() == text


def test_a_script_for_sbatch_of_a_config_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("script: train.py\ncluster: {slurm: {time: soon}}\n")
    assert main(["init", "mine", "--slurm"]) == 2
    assert "mine.yaml:2: cluster.slurm.time: expects minutes" in capsys.readouterr().err
    assert not (tmp_path / "mine.sbatch").exists()


def test_a_name_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "a\nb", "--slurm"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("train", "train_parts"),
        ("my-run", "my_run_parts"),
        ("3d", "run_3d_parts"),
        ("für", "f_r_parts"),
        ("%", "run_parts"),
    ],
)
def test_a_module_has_a_name_that_python_can_import(stem: str, module: str) -> None:
    assert module_name(stem) == module
    assert module.isidentifier()
