"""Whether the script of a config is there and can be read, asked of the nodes' Python before anything starts: nothing
of the script is run. What a script does wrong later is runtime/script.py's to report."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence

from dtrain.cluster.errors import Problem
from dtrain.cluster.nodescript import checking_script
from dtrain.launcher.bundle import Module
from dtrain.runtime.scriptconfig import SCRIPT_KEY, find_script, parse_script

_TIMEOUT_S = 60.0
# find_spec imports the packages around a module, as -m will; the source is compiled by the Python that will run it.
_CHILD = """
import importlib.util, io, json, sys
asked = json.loads(sys.argv[1])
sys.path[:0] = asked["sys_path"]
def look():
    if asked["path"]:
        with io.open_code(asked["path"]) as file:
            compile(file.read(), asked["path"], "exec")
        return ""
    for name in (asked["module"], asked["module"] + ".__main__"):
        found = importlib.util.find_spec(name)
        if found is None:
            return f"there is no module {name}"
        if found.submodule_search_locations is None:
            return ""
try:
    answer = look()
except SyntaxError as error:
    answer = f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
except Exception as error:
    answer = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(answer))
"""


def check_script_runs(
    text: str,
    origins: Mapping[str, str],
    python: str,
    sys_path: Sequence[str],
    environ: Mapping[str, str],
    setup: Sequence[str] = (),
) -> list[Problem]:
    """At most one problem. `sys_path`: the config's folder and the working directory, where scripts are looked for."""
    script = parse_script(text)
    path = find_script(script.path, sys_path) if script.path else None
    if script.path and path is None:
        key, message = SCRIPT_KEY, _not_there(script.path, sys_path)
    else:
        question = {"path": str(path or ""), "module": script.module, "sys_path": list(sys_path)}
        argv = [python, "-c", _CHILD, json.dumps(question)]
        command = ["bash", "-c", checking_script(setup, python, argv)] if setup else argv
        key, message = _ask(command, python, environ)
    return [Problem(where=origins.get(key, ""), key=key, message=message)] if message else []


def script_modules(text: str, sys_path: Sequence[str]) -> tuple[Module, ...]:
    """The script, or its package, and the packages beside it: nothing of it has been imported, so all may be used."""
    script = parse_script(text)
    if script.module:
        top = script.module.partition(".")[0]
        package = next((folder for folder in sys_path if os.path.isdir(os.path.join(folder, top))), None)
        plain = next((folder for folder in sys_path if os.path.isfile(os.path.join(folder, f"{top}.py"))), None)
        found = package or plain
        return (Module(name=top, folder=found, package=package is not None),) if found else ()
    path = find_script(script.path, sys_path)
    if path is None:
        return ()
    beside = sorted(entry.parent for entry in path.parent.glob("*/__init__.py"))
    packages = (Module(name=entry.name, folder=str(path.parent), package=True) for entry in beside)
    return Module(name=path.stem, folder=str(path.parent), package=False), *packages


def _not_there(path: str, folders: Sequence[str]) -> str:
    if any(os.path.isdir(os.path.join(folder, path)) for folder in folders):
        return f"{path} is a folder. Name the script in it, or a module: -m package."
    looked = f" Looked in {' and '.join(folders)}." if not os.path.isabs(path) else ""
    return f"there is no script {path}.{looked}"


def _ask(command: Sequence[str], python: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The key at fault and what is wrong, "" for nothing."""
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**environ, "PYTHONSAFEPATH": "1"},
            timeout=_TIMEOUT_S,
            start_new_session=True,
        )
    except OSError as error:
        return "cluster.python", f"the nodes' Python {python} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return SCRIPT_KEY, f"importing the package around it, after cluster.setup, took longer than {_TIMEOUT_S:g} s"
    last = child.stdout.splitlines()[-1:]
    if last and last[0].startswith(b'{"refused"'):
        refusal = json.loads(last[0])
        return refusal["refused"], refusal["message"]
    if child.returncode != 0 or not last:
        words = f"the nodes' Python {python} ended with code {child.returncode} while it looked at the script"
        return SCRIPT_KEY, words
    return SCRIPT_KEY, str(json.loads(last[0]))
