"""The command line as a whole: what it loads, what it says and with which code it ends when something is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.cluster.errors import CheckpointError, ConfigError, DtrainError, Problem, UsageError
from dtrain.launcher import cli

DTRAIN = [sys.executable, "-m", "dtrain.launcher.cli"]


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from dtrain.launcher.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'yaml', 'rich', 'numpy', 'asyncio'} & set(sys.modules);"
        "sys.exit(code or bool(heavy) and str(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command.name} " in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("name", [command.name for command in cli.COMMANDS])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: dtrain {name}" in capsys.readouterr().out
    assert importlib.import_module(f"dtrain.launcher.commands.{name}").HELP


@pytest.mark.parametrize(
    ("typed", "words"),
    [("lanch", 'Did you mean "launch"?'), ("frobnicate", "There are: launch, "), ("a.yaml", "dtrain launch a.yaml")],
)
def test_unknown_command_names_a_way_out(typed: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    assert words in capsys.readouterr().err


def test_no_command_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dtrain ")


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr("dtrain.launcher.commands.ls.run", run)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("no"), 2), (CheckpointError("no"), 1), (DtrainError("no"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_words_and_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert cli.main(["ls"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_config_errors_are_listed_with_their_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [
        Problem(where="cfg.yaml:3", key="train.steps", message="is missing"),
        Problem(where="", key="", message="x"),
    ]
    failing(monkeypatch, ConfigError(problems))
    assert cli.main(["ls"]) == 2
    assert capsys.readouterr().err == (
        "cfg.yaml:3: train.steps: is missing\nx\ndtrain: 2 problems; nothing was started.\n"
    )


def test_only_the_config_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["launch"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: cfg.yaml")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen([*DTRAIN, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    words = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == cli.BROKEN_PIPE
    assert words == ""


def test_options_may_stand_among_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.yaml"
    assert cli.main(["launch", str(missing), "a.b=1", "--nodes", "2", "c=3"]) == 2  # parsed: the complaint is the file
    assert "missing.yaml" in capsys.readouterr().err
