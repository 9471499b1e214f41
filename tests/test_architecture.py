"""Who may import whom, and who may not bring torch in. An import against the table fails the build.

Read statically, from all imports at any level, and then once more for real: the torch-free modules are imported in a
child process that must not have torch at the end.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# A folder may import itself and these. The launcher may also import whatever is torch-free in the others.
MAY_IMPORT = {
    "cluster": set(),
    "slurm": {"cluster"},
    "strategies": {"cluster"},
    "runtime": {"cluster", "strategies"},
    "launcher": {"cluster", "slurm", "strategies", "runtime"},
}
# Neither these nor anything that they import, at any level, may import torch: a login node answers in a blink, and an
# agent stays small. Below dtrain, as patterns.
TORCH_FREE = [
    "cluster*",
    "slurm*",
    "launcher*",
    "strategies.config",
    "strategies.boxes",
    "strategies.caps",
    "strategies.layout",
    "strategies.exactcheck",
    "strategies.exacttree",
    "runtime.config",
    "runtime.agent*",
    "runtime.coordinator*",
    "runtime.control*",
    "runtime.forkserver*",
    "runtime.progress",
    "runtime.report",
    "runtime.targets",
    "runtime.checkpoint.attempts",
    "runtime.checkpoint.manifest",
    "runtime.checkpoint.plan",
    "runtime.checkpoint.retention",
    "runtime.checkpoint.verify",
    "runtime.stores*",
    "runtime.weightfiles",
    "runtime.weightmatch",
]
# Where the launcher goes over to the other world: `launch --here` trains in its own process, `ckpt export` starts one.
MAY_NAME_TORCH_MODULES = {"dtrain.launcher.here", "dtrain.launcher.commands.ckpt_export"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    name: str  # dtrain.cluster.errors
    path: Path
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.name.split(".")[1]


@cache
def modules() -> dict[str, Module]:
    found = {}
    for folder in MAY_IMPORT:
        for path in sorted((REPO / folder).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            name = ".".join(("dtrain", *parts)).removesuffix(".__init__")
            found[name] = Module(name=name, path=path, tree=ast.parse(path.read_text(), filename=str(path)))
    return found


def imports(tree: ast.AST, *, type_checking: bool = True) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import at any level; `from a import b` gives a and a.b."""
    skipped = set() if type_checking else set(_type_checking_lines(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        if node.lineno not in skipped:
            yield from ((name, node.lineno) for name in names)


def _type_checking_lines(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from range(node.body[0].lineno, (node.body[-1].end_lineno or node.lineno) + 1)


@cache
def torch_free() -> frozenset[str]:
    """The modules that TORCH_FREE names and all that they import."""
    reached: set[str] = set()
    waiting = [name for name in modules() if any(fnmatch(name, f"dtrain.{pattern}") for pattern in TORCH_FREE)]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            found = imports(modules()[name].tree, type_checking=False)
            waiting += [imported for imported, _ in found if imported in modules()]
    return frozenset(reached)


@pytest.mark.parametrize("folder", list(MAY_IMPORT))
def test_a_folder_imports_only_what_the_table_allows(folder: str) -> None:
    wrong = [
        f"{module.path.relative_to(REPO)}:{line}: {folder}/ must not import {imported}"
        for module in modules().values()
        if module.folder == folder
        for imported, line in imports(module.tree)
        if imported.startswith("dtrain.") and imported.split(".")[1] not in MAY_IMPORT[folder] | {folder}
    ]
    assert wrong == []


def test_torch_free_modules_import_no_torch() -> None:
    wrong = [
        f"{modules()[name].path.relative_to(REPO)}:{line}: {name} must stay torch-free, but imports {imported}"
        for name in sorted(torch_free())
        for imported, line in imports(modules()[name].tree, type_checking=False)
        if imported.split(".")[0] in ("torch", "deepspeed", "horovod", "transformers")
    ]
    assert wrong == []


def test_torch_does_not_come_in_through_others() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} brought torch in')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *sorted(torch_free())], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_launch_starts_without_numpy() -> None:
    """Nor do the commands that people wait for: to import it takes a quarter of the time to the first word."""
    code = "import sys, dtrain.launcher.launching; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_agent_needs_nothing_but_dtrain_and_python() -> None:
    """What looks at a node's Python before the agent starts (cluster/nodescript.py) looks for no more."""
    code = "import sys; old = set(sys.modules); import dtrain.runtime.agent; print(*{*sys.modules} - old)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    brought = {name.split(".")[0] for name in said.split() if not name.startswith("_sysconfigdata")}
    assert brought - sys.stdlib_module_names == {"dtrain"}


def test_only_here_names_the_other_world() -> None:
    wrong = [
        f"{module.path.relative_to(REPO)}:{node.lineno}: names {node.value}, which imports torch"
        for module in modules().values()
        if module.folder == "launcher" and module.name not in MAY_NAME_TORCH_MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value in modules().keys() - torch_free()
    ]
    assert wrong == []


def test_imports_say_dtrain_and_are_absolute() -> None:
    """`import cluster` from the repository's root works by accident and loads a second copy of every class."""
    files = [
        path for folder in (*MAY_IMPORT, "tests", "examples", "benchmarks") for path in (REPO / folder).rglob("*.py")
    ]
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {imported}"
        for path in files
        for imported, line in imports(ast.parse(path.read_text()))
        if imported.startswith(".") or imported.split(".")[0] in MAY_IMPORT
    ]
    assert wrong == []


@pytest.mark.slow
def test_no_second_copy_is_loaded() -> None:
    """From the repository's root, where the bare names could be found."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        f"sys.exit(' '.join(set(sys.modules) & set({list(MAY_IMPORT)!r})) or 0)\n"
    )
    command = [sys.executable, "-c", code, *modules()]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(REPO) for folder in MAY_IMPORT for path in (REPO / folder).rglob("*.py")}
    assert sorted(listed) == sorted("dtrain." + ".".join(folder.parts) for folder in folders)
    assert [str(folder) for folder in folders if not (REPO / folder / "__init__.py").exists()] == []


def test_type_checkers_find_the_five_folders() -> None:
    links = {path.name: path.readlink() for path in (REPO / ".types" / "dtrain").iterdir()}
    assert links == {folder: Path("../..") / folder for folder in MAY_IMPORT}


def test_no_folder_shadows_the_package() -> None:
    """A dtrain/ folder in the root would win over the installed package wherever the root is the working directory."""
    assert not (REPO / "dtrain").exists()
