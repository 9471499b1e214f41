"""Building Horovod: what is said where it can't be done, and that a wheel is built once. The build itself is what
`make install` does before these tests; tests/test_horovod.py then uses what came out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.errors import ConfigError, UsageError
from dtrain.launcher import build_horovod
from dtrain.launcher.compose import load_config
from dtrain.strategies import horovodjoin

SCRIPT = Path(build_horovod.__file__)


def build(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """As .ci/install runs it, before dtrain is installed."""
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def test_missing_compilers_are_named_with_what_to_do(tmp_path: Path) -> None:
    result = build("--wheel", "--cache", str(tmp_path), PATH=str(tmp_path), CXX="no-such-compiler")
    assert result.returncode == build_horovod.MISSING_TOOLS
    assert "no-such-compiler are not on this machine" in result.stderr
    assert "python -m dtrain.launcher.build_horovod" in result.stderr
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_a_wheel_is_built_once_for_each_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def fake_build(place: Path) -> Path:
        builds.append(place)
        wheel = place / "horovod-0.28.1-py3-none-any.whl"
        wheel.touch()
        return wheel

    monkeypatch.setattr(build_horovod, "_build", fake_build)
    monkeypatch.setattr(build_horovod, "missing_tools", lambda: "")
    first = build_horovod.wheel_for_this_python(tmp_path)
    assert build_horovod.wheel_for_this_python(tmp_path) == first
    assert len(builds) == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    monkeypatch.setattr(build_horovod, "version", lambda name: "2.99.0")
    assert build_horovod.wheel_for_this_python(tmp_path) != first
    monkeypatch.setenv("HOROVOD_WITH_MPI", "1")
    assert build_horovod.wheel_for_this_python(tmp_path) != first
    assert len(builds) == 2, "what is not among the settings does not matter"
    monkeypatch.setenv("HOROVOD_WITHOUT_MPI", "0")
    build_horovod.wheel_for_this_python(tmp_path)
    assert len(builds) == 3


def test_a_wheel_without_its_library_is_none(tmp_path: Path) -> None:
    for name, fits in (("horovod/torch/mpi_lib_v2.so", True), ("root/horovod/torch/mpi_lib_v2.so", False)):
        wheel = tmp_path / "horovod.whl"
        with zipfile.ZipFile(wheel, "w") as content:
            content.writestr(name, "")
        if fits:
            build_horovod.check_wheel(wheel)
            continue
        with pytest.raises(build_horovod.BuildError, match="holds no"):
            build_horovod.check_wheel(wheel)


def test_another_source_than_the_one_that_the_patch_is_for_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "CMakeLists.txt"
    source.write_text("set(CMAKE_CXX_STANDARD 14)\n")
    build_horovod._patch(source)
    assert source.read_text() == "set(CMAKE_CXX_STANDARD 17)\n"
    with pytest.raises(build_horovod.BuildError, match="is there 0 times"):
        build_horovod._patch(source)


def test_a_launch_without_horovod_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without_horovod(name: str, package: str | None = None) -> Any:
        return None if name == "horovod" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_horovod)
    config = tmp_path / "cfg.yaml"
    config.write_text(
        "model: {_target_: torch.nn.Identity}\ndata: {train: {_target_: builtins.list}, batch_size: 4}\n"
        "optimizer: {_target_: torch.optim.SGD}\ntrain: {steps: 1}\nstrategy: horovod\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(config, [])
    (problem,) = caught.value.problems
    assert problem.where.endswith("cfg.yaml:5")
    assert "horovod, which is not installed here" in problem.message
    assert "python -m dtrain.launcher.build_horovod" in problem.message
    config.write_text(config.read_text() + "cluster: {python: /opt/env/bin/python}\n")
    load_config(config, [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('mpi_lib_v2.so: undefined symbol: _ZN3c10')", "undefined symbol"),
        ("", "No module named 'horovod.torch.mpi_lib_v2'"),
    ],
    ids=["for another torch", "without its compiled part"],
)
def test_a_horovod_that_was_built_otherwise_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    package = tmp_path / "horovod" / "torch"
    package.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    forget_horovod(monkeypatch)
    with pytest.raises(UsageError, match=rf"does not fit torch .*{words}.*build_horovod"):
        horovodjoin.import_horovod()
    forget_horovod(monkeypatch)


def forget_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
