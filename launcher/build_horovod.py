"""Builds Horovod's last release for this Python's torch and installs it: `python -m dtrain.launcher.build_horovod`.

That release (0.28.1 of 2023, a source distribution only) does not compile against torch 2.1 or newer, whose headers ask
for C++17: the two lines that say C++14 are changed, and nothing else. Upstream made the same change (horovod#3998)
after it. Runs before dtrain is installed, too, so it imports nothing of ours and nothing outside the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSION = "0.28.1"
PATCHED_FILES = ("CMakeLists.txt", "horovod/torch/CMakeLists.txt")
PATCH = ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)")
# Only what dtrain uses. A variable of the same name that is exported wins.
SETTINGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_CPU_OPERATIONS": "GLOO",
    "HOROVOD_WITHOUT_NVTX": "1",
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # of its third parties, for CMake 4
    "LDFLAGS": "-Wl,-s",  # debug symbols would make the wheel 18 times as large
}
REQUIREMENTS = ("cloudpickle", "packaging", "psutil", "pyyaml")  # its own, as its setup.py says
MISSING_TOOLS = 3  # exit code


class BuildError(Exception):
    """In words for a person."""


def wheel_for_this_python(cache: Path) -> Path:
    """The cached wheel, built first where there is none. Raises BuildError."""
    folder = cache / _key()
    if found := sorted(folder.glob("horovod-*.whl")):
        return found[0]
    if missing := missing_tools():
        raise BuildError(missing)
    _say(f"building Horovod {VERSION} for torch {_torch_version()} (its source with C++17 for C++14; about 4 minutes)")
    folder.mkdir(parents=True, exist_ok=True)
    # Not below the cache: Horovod's CMake files take their own path for a regular expression, and "+cpu" is none.
    with tempfile.TemporaryDirectory(prefix="horovod-") as place:
        built = _build(Path(place))
        half = Path(shutil.copy(built, folder / f"{os.getpid()}.part"))
        return half.replace(folder / built.name)


def missing_tools() -> str:
    """What this machine lacks for a build, and what to do; "" where nothing."""
    wanted = ("cmake", "make", os.environ.get("CXX", "g++"))
    missing = [tool for tool in wanted if shutil.which(tool, path=_search_path()) is None]
    if not missing:
        return ""
    names, verb = ", ".join(missing), "is" if len(missing) == 1 else "are"
    how = "Install with the system's packages (cmake also with pip), then: python -m dtrain.launcher.build_horovod"
    return f"Horovod is compiled here, and {names} {verb} not on this machine. {how}"


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dtrain" / "horovod"


def _key() -> str:
    """A build fits one torch, one Python, one kind of machine; and it is this one."""
    settings = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    build = hashlib.sha256(repr((PATCHED_FILES, PATCH, sorted(settings.items()))).encode()).hexdigest()[:8]
    python = f"{sys.implementation.name}{sys.version_info.major}.{sys.version_info.minor}"
    return f"{VERSION}-torch{_torch_version()}-{python}-{platform.machine()}-{build}"


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        raise BuildError(f"{sys.executable} has no torch, and Horovod is built for one. Install torch first.") from None


def _build(place: Path) -> Path:
    _pip(place, "download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", f"horovod=={VERSION}", "-d", ".")
    (archive,) = place.glob("horovod-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(place, filter="data")
    tree = place / f"horovod-{VERSION}"
    for name in PATCHED_FILES:
        _patch(tree / name)
    _pip(place, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", "out", str(tree))
    (wheel,) = (place / "out").glob("horovod-*.whl")
    check_wheel(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raises BuildError where what was compiled is not where Python looks for it."""
    with zipfile.ZipFile(wheel) as content:
        compiled = [name for name in content.namelist() if name.endswith(".so")]
    if not any(name.startswith("horovod/torch/mpi_lib") for name in compiled):
        raise BuildError(f"the wheel holds no horovod/torch/mpi_lib*.so, only {', '.join(compiled) or 'Python'}.")


def _patch(path: Path) -> None:
    text = path.read_text()
    if text.count(PATCH[0]) != 1:
        raise BuildError(f"{path.name}: {PATCH[0]} is there {text.count(PATCH[0])} times, not once as in {VERSION}.")
    path.write_text(text.replace(*PATCH))


def _search_path() -> str:
    """With the programs of this Python's environment first: CMake asks `python` where torch is."""
    return os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))


def _pip(place: Path, *arguments: str) -> None:
    """Silent unless it fails."""
    parallel = {"MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}"}
    environ = {**parallel, **SETTINGS, **os.environ, "PATH": _search_path()}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise BuildError(f"pip {arguments[0]} failed:\n{last}")


def _say(text: str) -> None:
    print(f"build_horovod: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dtrain.launcher.build_horovod", description=__doc__)
    parser.add_argument("--wheel", action="store_true", help="print the wheel's path and install nothing")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where wheels are kept (%(default)s)")
    options = parser.parse_args()
    try:
        wheel = wheel_for_this_python(options.cache)
        if options.wheel:
            print(wheel)
        else:
            _pip(Path.cwd(), "install", *REQUIREMENTS)
            # One that was built for another torch has the same version.
            _pip(Path.cwd(), "install", "--no-deps", "--force-reinstall", str(wheel))
            _say(f"installed {wheel.name}")
    except BuildError as error:
        _say(str(error))
        return MISSING_TOOLS if missing_tools() else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
