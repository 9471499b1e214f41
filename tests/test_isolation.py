"""conftest.py's promise: a test that leaves something behind fails, and a skip fails where nothing may be missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CONFTEST = Path(__file__).with_name("conftest.py")

# Name of a test file -> its text and, where it must fail with DTRAIN_CI=1, what the report says.
CASES = {
    "clean": ("def test(tmp_path):\n    open('relative', 'w').close()\n", ""),
    "child": ("import subprocess\ndef test():\n    subprocess.Popen(['sleep', '61.5'])\n", "sleep 61.5"),
    "detached": (
        "import subprocess\ndef test():\n    subprocess.run(['sh', '-c', 'setsid sleep 62.5 >/dev/null 2>&1 &'])\n",
        "sleep 62.5",
    ),
    "port": (
        "import socket\nkept = socket.socket()\ndef test():\n    kept.bind(('127.0.0.1', 0))\n    kept.listen()\n",
        "listening port 127.0.0.1:",
    ),
    "temporary": ("import tempfile\ndef test():\n    tempfile.mkdtemp(prefix='forgotten')\n", "forgotten"),
    "file": (
        "from pathlib import Path\ndef test():\n    Path(__file__).parents[1].joinpath('stray').touch()\n",
        "stray",
    ),
    "skip": ("import pytest\ndef test():\n    pytest.skip('no such server')\n", "no such server"),
    "skip_module": ("import pytest\npytest.importorskip('no_such_module')\n", "no_such_module"),
    "gpu": ("import pytest\n@pytest.mark.gpu\ndef test():\n    pytest.skip('no GPU')\n", ""),
}


def run_pytest(folder: Path, names: list[str], *, ci: bool) -> str:
    """What pytest with our conftest prints about these cases, in a repository of its own."""
    tests = folder / "repo" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(CONFTEST, tests)
    for name in names:
        (tests / f"test_{name}.py").write_text(CASES[name][0])
    (folder / "repo" / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -rA\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # The inner run's processes must not carry the outer test's mark: the inner conftest is what is tested.
    environ = {key: value for key, value in os.environ.items() if key not in ("DTRAIN_CI", "DTRAIN_TEST_ID")}
    environ |= {"DTRAIN_CI": "1"} if ci else {}
    result = subprocess.run(
        [*command, f"--basetemp={folder / 'base'}", "tests"],
        cwd=folder / "repo",
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


def failed(output: str, name: str) -> bool:
    """Whether the short summary counts this case among the failures or errors."""
    return any(f"{word} tests/test_{name}.py" in output for word in ("FAILED", "ERROR"))


@pytest.fixture(scope="module")
def in_ci(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_pytest(tmp_path_factory.mktemp("ci"), list(CASES), ci=True)


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "message"), [(name, message) for name, (_, message) in CASES.items()])
def test_what_is_left_behind_fails_the_test(name: str, message: str, in_ci: str) -> None:
    assert failed(in_ci, name) == bool(message), in_ci
    assert message in in_ci


@pytest.mark.slow
def test_a_leaked_process_is_ended(in_ci: str) -> None:
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "61.5"] not in commands
    assert ["sleep", "62.5"] not in commands


@pytest.mark.slow
def test_a_skip_is_a_skip_elsewhere(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, ["skip", "skip_module"], ci=False)
    assert "2 skipped" in output
    assert "failed" not in output
