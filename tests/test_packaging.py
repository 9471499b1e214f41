"""The wheel: works from any directory without the repository, and installs no generic top-level name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("cluster", "launcher", "runtime", "slurm", "strategies")
NO_CACHES = shutil.ignore_patterns("__pycache__", ".*")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, because setuptools writes build/ and an egg-info folder beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(REPO / folder, source / folder, ignore=NO_CACHES)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / file, source)
    target = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", *build, target, source], check=True, timeout=300)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def run_installed(wheel: zipfile.ZipFile, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an empty directory where the unpacked wheel is found and the editable install is not."""
    site, elsewhere = folder / "site", folder / "elsewhere"
    wheel.extractall(site)
    elsewhere.mkdir()
    # -I -S: neither the working directory nor .pth files, through which the editable install would come.
    path = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"]
    return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_no_generic_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"dtrain", next(name for name in top if name.endswith(".dist-info"))}


@pytest.mark.slow
def test_every_file_of_the_five_folders_is_in_it(wheel: zipfile.ZipFile) -> None:
    files = (path for folder in FOLDERS for path in (REPO / folder).rglob("*") if path.is_file())
    wanted = {f"dtrain/{path.relative_to(REPO)}" for path in files if "__pycache__" not in path.parts}
    packed = {name for name in wheel.namelist() if name.startswith("dtrain/")}
    assert packed == wanted, "a data file is listed in pyproject.toml, tool.setuptools.package-data"


@pytest.mark.slow
def test_license_is_in_it(wheel: zipfile.ZipFile) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.slow
def test_the_command_works_elsewhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    code = (
        "import dtrain.launcher.cli as cli\n"
        "print(cli.__file__)\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
    )
    result = run_installed(wheel, tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "site")), result.stdout
    assert "launch" in result.stdout


@pytest.mark.slow
def test_the_console_script_names_it(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "dtrain = dtrain.launcher.cli:main" in wheel.read(name).decode()
