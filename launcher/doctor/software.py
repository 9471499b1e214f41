"""The nodes' Python and what it has: torch and its devices, our extras at their lower bounds, compiler, git.

Asked in a child process of that Python: the command line stays free of torch, and another environment can be asked.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from dtrain.cluster.devices import count_gpus
from dtrain.launcher.doctor.finding import Finding, ok, problem, warn
from dtrain.strategies.caps import CAPS, Package

TOPIC = "software"
_CHILD_S = 120
_ASK = """
import importlib.metadata as metadata, json, shutil, sys
found = {"python": sys.version.split()[0], "executable": sys.executable}
found["compiler"] = shutil.which("g++") or shutil.which("clang++") or ""
found["git"] = shutil.which("git") or ""
try:
    found["dtrain"] = metadata.version("dtrain")
    found["requires"] = metadata.requires("dtrain") or []
except metadata.PackageNotFoundError:
    found["requires"] = []
versions = {}
for distribution in metadata.distributions():
    versions.setdefault((distribution.metadata["Name"] or "").lower().replace("_", "-"), distribution.version)
found["versions"] = versions
try:
    import torch
    found["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda or "", "devices": [], "error": ""}
    if torch.version.cuda:
        try:
            torch.cuda.init()
            names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            found["torch"]["devices"] = names
        except Exception as error:
            found["torch"]["error"] = str(error).splitlines()[0]
except Exception as error:
    found["torch"] = {"version": "", "error": f"{type(error).__name__}: {error}"}
print("\\n" + json.dumps(found))
"""
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9.]+)\s*(?:;\s*extra\s*==\s*[\"']([^\"']+)[\"'])?$"
)


def examine(python: str) -> Iterator[Finding]:
    found = _ask(python)
    if isinstance(found, Finding):
        yield found
        return
    yield _python(found)
    yield _dtrain(found, python)
    yield from _torch(found)
    yield from _packages(found)
    yield from _strategies(found)
    if found["compiler"]:
        yield ok(TOPIC, "compiler", found["compiler"])
    else:
        advice = "Only train.compile on CPU needs one. On Debian and Ubuntu: apt-get install g++"
        yield warn(TOPIC, "compiler", "no C++ compiler on the PATH", advice)
    if found["git"]:
        yield ok(TOPIC, "git", found["git"])
    else:
        yield warn(TOPIC, "git", "not on the PATH", "Runs will not record the commit that they trained.")


def _ask(python: str) -> dict[str, Any] | Finding:
    try:
        child = subprocess.run(
            [python, "-P", "-c", _ASK], capture_output=True, text=True, timeout=_CHILD_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        advice = "Set cluster.python to a Python of 3.11 or newer that has dtrain."
        return problem(TOPIC, "python", f"{python} can't be asked: {error}", advice)
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        words = (child.stderr.strip().splitlines() or ["no word"])[-1]
        return problem(TOPIC, "python", f"{python} ended with {child.returncode}: {words}", "Is it 3.11 or newer?")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _python(found: dict[str, Any]) -> Finding:
    text = f"{found['python']} ({found['executable']})"
    if _numbers(found["python"]) < (3, 11):
        return problem(TOPIC, "python", text, "3.11 or newer is needed: set cluster.python.")
    return ok(TOPIC, "python", text)


def _dtrain(found: dict[str, Any], python: str) -> Finding:
    if "dtrain" not in found:
        return problem(TOPIC, "dtrain", f"not installed for {python}", f"{python} -m pip install dtrain")
    return ok(TOPIC, "dtrain", found["dtrain"])


def _torch(found: dict[str, Any]) -> Iterator[Finding]:
    torch = found["torch"]
    if not torch["version"]:
        yield problem(TOPIC, "torch", torch["error"], "Install it as https://pytorch.org/get-started says.")
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU only"
    yield ok(TOPIC, "torch", f"{torch['version']}, {build}")
    gpus, devices = count_gpus(), torch.get("devices", [])
    if gpus and not torch["cuda"]:
        advice = "Install a CUDA build of torch, or export CUDA_VISIBLE_DEVICES= (empty) to train on CPUs."
        yield problem(TOPIC, "GPUs", f"{gpus}, but this torch is a CPU build", advice)
    elif gpus != len(devices):
        reason = f": {torch['error']}" if torch["error"] else ""
        advice = "The driver may be older than this torch's CUDA: compare `nvidia-smi` with torch.version.cuda."
        yield problem(TOPIC, "GPUs", f"{gpus} in the machine, {len(devices)} for torch{reason}", advice)
    elif devices:
        yield ok(TOPIC, "GPUs", ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)))
    else:
        yield ok(TOPIC, "GPUs", "none: workers run on CPU")


def _packages(found: dict[str, Any]) -> Iterator[Finding]:
    """Packages that are needed must be there; those of an extra may be missing, but not too old."""
    extras: dict[str, list[str]] = {}
    for requirement in found["requires"]:
        match = _REQUIREMENT.match(requirement)
        if match is None or match[1] == "torch" or match[3] == "dev":
            continue
        name, least, extra = match[1], match[2], match[3] or ""
        version = found["versions"].get(name.lower().replace("_", "-"))
        if version is not None and _numbers(version) < _numbers(least):
            yield problem(TOPIC, name, f"{version}, but {least} or newer is needed", f"pip install '{name}>={least}'")
        elif version is None and not extra:
            yield problem(TOPIC, name, f"missing, {least} or newer is needed", f"pip install '{name}>={least}'")
        else:
            extras.setdefault(extra, []).append(f"{name} {version}" if version else "")
    for extra, packages in extras.items():
        if all(packages):
            yield ok(TOPIC, f"extra {extra}" if extra else "packages", ", ".join(packages))
        else:
            yield ok(TOPIC, f"extra {extra}", f"not installed; where you need it: pip install 'dtrain[{extra}]'")


def _strategies(found: dict[str, Any]) -> Iterator[Finding]:
    """Those whose packages are there, and what to do about the others. Nothing here is wrong: who takes another
    strategy needs no package."""
    runnable, without = [], dict[Package, list[str]]()
    for name, caps in CAPS.items():
        missing = [package for package in caps.needs if package.module not in found["versions"]]
        versions = [f"{package.module} {found['versions'].get(package.module)}" for package in caps.needs]
        if not missing:
            runnable.append(f"{name} ({', '.join(versions)})" if versions else name)
        for package in missing:
            without.setdefault(package, []).append(name)
    yield ok(TOPIC, "strategies", ", ".join(runnable))
    for package, names in without.items():
        words = f"needs {package.module}, which is not installed. {package.install}"
        yield ok(TOPIC, f"strategy {', '.join(names)}", words)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])
