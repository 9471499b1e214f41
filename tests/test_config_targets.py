"""Targets: resolving, building and checking them, and the child process that keeps the command line safe from them."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.errors import Problem, UsageError
from dtrain.launcher.compose import load_config
from dtrain.launcher.targetcheck import check_targets
from dtrain.runtime.config import Target
from dtrain.runtime.targets import as_callable, build, check, resolve

MODULE = """
    class Net:
        def __init__(self, width, *, depth=2):
            self.size = (width, depth)
        class Block:
            pass
    class Loss:
        def __init__(self, scale=1.0):
            self.scale = scale
        def __call__(self, output, batch):
            return self.scale * (output - batch)
    def loss(output, batch, scale=1.0):
        return scale * (output - batch)
    def anything(*args, **kwargs): ...
    number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mod_{tmp_path.name}"  # sys.modules outlives a test
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _target(name: str, **kwargs: Any) -> Target:
    return Target(target=name, kwargs=kwargs)


def test_resolve(module: str) -> None:
    assert resolve("json.dumps")([1]) == "[1]"
    assert resolve("os.path.join")("a", "b") == "a/b"
    assert resolve("xml.dom.minidom.Document").__name__ == "Document"  # a submodule that importing xml does not import
    assert resolve(f"{module}.Net.Block").__name__ == "Block"


@pytest.mark.parametrize(
    ("dotted", "words"),
    [
        ("no_such_thing.x", "there is no module no_such_thing."),
        ("jsn.dumps", "there is no module jsn. Did you mean json?"),
        ("json.dmps", "the module json has no dmps. Did you mean json.dumps?"),
        ("xml.dmo.minidom", "the module xml has no dmo. Did you mean xml.dom?"),
        ("json.dumps.x", "the object json.dumps has no x."),
    ],
)
def test_what_cannot_be_resolved(dotted: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(dotted)
    assert words in str(caught.value)


def test_build_and_as_callable(module: str) -> None:
    assert build(_target(f"{module}.Net", depth=5), 7).size == (7, 5)
    assert as_callable(_target(f"{module}.loss", scale=2.0))(3, 1) == 4
    assert as_callable(_target(f"{module}.Loss", scale=3.0))(3, 1) == 6
    with pytest.raises(UsageError, match="an instance of it cannot be called"):
        as_callable(_target(f"{module}.Net", width=1))
    with pytest.raises(UsageError, match="is a value of type int, which cannot be called"):
        build(_target(f"{module}.number"))


@pytest.mark.parametrize(
    ("name", "num_positional", "instance", "kwargs", "words"),
    [
        ("Net", 0, False, {"width": 1}, None),
        ("Net", 1, False, {}, None),
        ("Net", 1, False, {"width": 1}, "width is passed by dtrain itself, so leave it out"),
        ("Net", 0, False, {"width": 1, "dept": 1}, "it has no parameter dept, did you mean depth?"),
        ("Net", 0, False, {}, "its argument width is required and missing"),
        ("Net", 2, False, {}, "it is called with 2 positional arguments, but takes 1"),
        ("Net", 2, True, {"width": 1}, "an instance of it cannot be called"),
        ("Loss", 2, True, {"scale": 1}, None),
        ("Loss", 2, True, {"scal": 1}, "did you mean scale?"),
        ("loss", 2, True, {"scale": 1}, None),
        ("loss", 1, True, {}, "its argument batch is required and missing"),
        ("anything", 9, False, {"x": 1}, None),
    ],
)
def test_check(module: str, name: str, num_positional: int, instance: bool, kwargs: Any, words: str | None) -> None:
    found = check(_target(f"{module}.{name}", **kwargs), num_positional, instance=instance)
    assert found is None if words is None else words in (found or "")
    assert "?." not in (found or "")


def test_signatures_that_cannot_be_known_pass() -> None:
    assert check(_target("builtins.dict", x=1), 3) is None


# ---- the child ----


def _problems(
    folder: Path, source: str, *, python: str = sys.executable, timeout_s: float = 180, overrides: Sequence[str] = ()
) -> list[Problem]:
    (folder / "mine.py").write_text(textwrap.dedent(source))
    (folder / "cfg.yaml").write_text(
        "model: mine.f\ndata: {train: mine.f, batch_size: 1}\noptimizer: {_target_: mine.g}\ntrain: {steps: 1}\n"
    )
    return check_targets(load_config("cfg.yaml", overrides), python, [str(folder)], timeout_s=timeout_s)


GOOD = "def f(): ...\ndef g(params): ...\n"


def test_prints_and_questions_of_a_module_do_no_harm(tmp_path: Path) -> None:
    noisy = """
    import os, subprocess, sys
    print('{"messages": ["made up"]}', flush=True)
    os.write(1, b'{"begun": 0}\\n')
    subprocess.run(["echo", '{"messages": []}'])
    sys.stderr.write("warning\\n")
    try:
        input("how many? ")
    except EOFError:
        pass
    """
    assert _problems(tmp_path, textwrap.dedent(noisy) + GOOD) == []


def test_threads_of_a_module_do_not_keep_the_child(tmp_path: Path) -> None:
    waiting = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    begun = time.monotonic()
    assert _problems(tmp_path, waiting + GOOD) == []
    assert time.monotonic() - begun < 30


def test_a_crash_is_a_problem_of_its_target(tmp_path: Path) -> None:
    problems = _problems(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert [(p.where, p.key) for p in problems] == [
        ("cfg.yaml:1", "model._target_"), ("cfg.yaml:2", "data.train._target_"), ("cfg.yaml:3", "optimizer._target_")
    ]  # fmt: skip
    assert "importing mine.f ended its process: Segmentation fault" in problems[0].message


@pytest.mark.slow
def test_a_hang_ends_with_the_time_and_leaves_nothing(tmp_path: Path) -> None:
    # The grandchild must go, too: the fixture around every test looks for it.
    hang = "import subprocess, time\nsubprocess.Popen(['sleep', '300'])\ntime.sleep(300)\n"
    problems = _problems(tmp_path, hang, timeout_s=3)
    assert [p.key for p in problems] == ["model._target_"]
    assert "importing mine.f took longer than 3 s" in problems[0].message


def test_a_missing_interpreter(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, GOOD, python="/no/such/python")
    assert problem.message.startswith("the nodes' Python /no/such/python cannot be started: No such file or directory.")


def test_an_interpreter_without_dtrain(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" -S -E "$@"\n')
    bare.chmod(0o755)
    (problem,) = _problems(tmp_path, GOOD, python=str(bare))
    assert problem.message == f"the nodes' Python {bare} has no dtrain. Install it there: {bare} -m pip install dtrain"


def test_the_child_sees_the_environment_of_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import os\nassert 'PYTHONSAFEPATH' not in os.environ\nassert (level := os.environ['LEVEL']) == '3', level\n"
    )
    assert _problems(tmp_path, source + GOOD, overrides=["cluster.env.LEVEL=3"]) == []
    monkeypatch.setenv("LEVEL", "4")
    assert "AssertionError: 4" in _problems(tmp_path, source + GOOD, overrides=["cluster.env.LEVEL=3"])[0].message
