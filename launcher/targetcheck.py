"""Whether the config's targets can be imported and take their keywords, asked in a child process of the nodes' Python.

So the command line stays free of torch, and a module that prints, hangs or crashes harms nothing. Only imports and
signatures are looked at; nothing is constructed. Run as a module, this file is the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Any, NoReturn

from dtrain.cluster.errors import Problem
from dtrain.cluster.nodescript import checking_script
from dtrain.cluster.secretrefs import file_values
from dtrain.cluster.zygote import Zygote, ZygoteError
from dtrain.launcher.bundle import Module
from dtrain.launcher.scriptcheck import check_script_runs, script_modules
from dtrain.runtime.scriptconfig import ScriptRunConfig
from dtrain.runtime.targetlist import TargetCheck, faults, target_checks
from dtrain.slurm.container import has_own_python

if TYPE_CHECKING:
    from dtrain.launcher.compose import LaunchConfig

_INSTALLED = re.compile(r"/(site|dist)-packages/")
_MODULE = "dtrain.launcher.targetcheck"
_EXIT_CODE_S = 60.0  # a zygote's longest import, on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    problems: list[Problem]
    modules: tuple[Module, ...] = ()  # what importing the targets has brought in, but the environment's own


def check_targets(
    config: LaunchConfig,
    python: str,
    sys_path: Sequence[str],
    timeout_s: float = 120,
    *,
    zygote: Zygote | None = None,
) -> list[Problem]:
    """Problems with the file:line of each `_target_`. `sys_path` goes in front of the child's module search path.
    With `zygote` the child is its fork where possible: the same answers, without another import of torch.
    """
    return look_at_targets(config, python, sys_path, timeout_s, zygote=zygote).problems


def look_at_targets(
    config: LaunchConfig,
    python: str,
    sys_path: Sequence[str],
    timeout_s: float = 120,
    *,
    zygote: Zygote | None = None,
) -> Checked:
    """check_targets, and what was imported on the way.

    A target that takes its child down costs only itself: the ones after it are asked in another child. In an image with
    a Python of its own nobody can look from here; there the workers find what is wrong.
    """
    if has_own_python(config.cluster.container, python):
        return Checked(problems=[])
    if config.cluster.container is not None or config.cluster.backend == "kubernetes":  # setup lines are for inside
        config = replace(config, cluster=replace(config.cluster, setup=()))
    if config.cluster.backend == "kubernetes":
        python = sys.executable  # nobody can look into the image; this one has the same dtrain
    environ = {**config.cluster.env, **os.environ, "PYTHONSAFEPATH": "1"}  # what was exported wins, as for workers
    if isinstance(config.content, ScriptRunConfig):
        script = config.content.script
        problems = check_script_runs(script, config.origins, python, sys_path, environ, config.cluster.setup)
        return Checked(problems=problems, modules=() if problems else script_modules(script, sys_path))
    command = _command(python, config.cluster.setup)
    world = {"sys_path": list(sys_path), "secrets": config.cluster.secrets}
    problems = []
    modules: tuple[Module, ...] = ()
    pending = target_checks(config.run)
    while pending:
        answer = _ask(command, {**world, "checks": list(map(asdict, pending))}, environ, timeout_s, zygote)
        if answer.refused is not None:
            key, message = answer.refused
            return Checked(problems=[*problems, Problem(where=config.origins.get(key, ""), key=key, message=message)])
        if not answer.begun and answer.timed_out and config.cluster.setup:
            message = f"took longer than {timeout_s:g} s, the look at the nodes' Python included."
            where = config.origins["cluster.setup.0"]
            return Checked(problems=[*problems, Problem(where=where, key="cluster.setup", message=message)])
        if not answer.begun:
            where = config.origins["cluster.python"] if config.cluster.python != "auto" else ""
            key = "cluster.python" if where else ""
            return Checked(problems=[*problems, Problem(where=where, key=key, message=_no_child(python, answer))])
        modules += answer.modules
        problems += [
            Problem(where=check.where, key=f"{check.key}._target_", message=message)
            for check, messages in zip(pending, answer.messages, strict=False)
            for message in messages
        ]
        pending = pending[len(answer.messages) :]
        if pending:
            stuck, *pending = pending
            words = f' It said last: "{answer.last_words}".' if answer.last_words else ""
            message = f"importing {stuck.target} {answer.end}.{words} A module must import without training or exiting."
            problems.append(Problem(where=stuck.where, key=f"{stuck.key}._target_", message=message))
        if answer.timed_out:
            break  # each of the others might take as long
    return Checked(problems=problems, modules=modules)


# ---- the parent ----


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    begun: bool  # the child got as far as its first target
    messages: tuple[tuple[str, ...], ...]  # one entry for each target that was checked to the end
    end: str  # how the child ended, in words
    timed_out: bool
    last_words: str  # the last line that it printed
    modules: tuple[Module, ...]
    refused: tuple[str, str] | None  # the key and the reason where a setup line or the Python failed before it


def _command(python: str, setup: Sequence[str]) -> Sequence[str]:
    """The child's: with setup lines, as on a node, in a shell that runs these first."""
    child = [python, "-m", _MODULE]
    return ["bash", "-c", checking_script(setup, python, child)] if setup else child


def _ask(
    command: Sequence[str],
    request: Mapping[str, Any],
    environ: Mapping[str, str],
    timeout_s: float,
    zygote: Zygote | None,
) -> _Answer:
    with tempfile.TemporaryFile() as stderr:
        forked = _run_fork(zygote, request, stderr, timeout_s) if zygote else None
        output, end, timed_out = forked or _run_child(command, json.dumps(request), environ, stderr, timeout_s)
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").splitlines()
    lines = [json.loads(line) for line in output.split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    refused = next(((line["refused"], line["message"]) for line in lines if "refused" in line), None)
    return _Answer(
        begun=bool(lines),
        refused=refused,
        modules=tuple(Module(**module) for line in lines for module in line.get("modules", ())),
        messages=tuple(tuple(line["messages"]) for line in lines if "messages" in line),
        end=end or "ended its process",
        timed_out=timed_out,
        last_words=next((line.strip() for line in reversed(said) if line.strip()), ""),
    )


def _run_child(
    command: Sequence[str], request: str, environ: Mapping[str, str], stderr: IO[bytes], timeout_s: float
) -> tuple[bytes, str, bool]:
    """Standard output, how it ended in words, and whether that was for the time."""
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=dict(environ),
            start_new_session=True,  # so that a timeout or Ctrl-C can end what the user's modules have started, too
        )
    except OSError as error:
        return b"", f"cannot be started: {error.strerror}", False
    try:
        output, _ = child.communicate(request.encode(), timeout=timeout_s)
        return output, _ended(child.returncode), False
    except subprocess.TimeoutExpired as error:
        return error.output or b"", f"took longer than {timeout_s:g} s", True
    finally:
        _end_session(child)


def _run_fork(
    zygote: Zygote, request: Mapping[str, Any], stderr: IO[bytes], timeout_s: float
) -> tuple[bytes, str, bool] | None:
    """As _run_child; None where the zygote can't serve, and the plain way is to be taken."""
    reading, writing = os.pipe()
    argument = {"entry": f"{_MODULE}:answer", "request": request}
    with open(reading, "rb", buffering=0) as answers:
        try:
            pid = zygote.fork(
                "dtrain.runtime.zygote:check", argument, stdout=writing, stderr=stderr.fileno(), environ={}, early=True
            )
        except ZygoteError:
            return None
        finally:
            os.close(writing)
        try:
            output, timed_out = _read_all(answers, time.monotonic() + timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # it leads a session: what the user's modules have started, too
        # How it ended, the zygote tells between its imports: not waited for where nobody asks.
        code = 0 if _is_complete(output) else zygote.wait(pid, _EXIT_CODE_S)
    return output, f"took longer than {timeout_s:g} s" if timed_out else _ended(code), timed_out


def _is_complete(output: bytes) -> bool:
    """Whether the child has come to its last word."""
    return output.rstrip(b"\n").rpartition(b"\n")[2].startswith(b'{"modules"')


def _read_all(stream: IO[bytes], deadline: float) -> tuple[bytes, bool]:
    """Everything up to the end, or what came until the deadline, and whether it was that."""
    output = b""
    while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = stream.read(1 << 16)
        if not part:
            return output, False
        output += part
    return output, True


def _end_session(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe and not pipe.closed:
            pipe.close()


def _ended(code: int) -> str:
    if code < 0:
        return f"ended its process: {signal.strsignal(-code) or f'signal {-code}'}"
    return f"ended its process with exit code {code}"


def _no_child(python: str, answer: _Answer) -> str:
    if "No module named" in answer.last_words and "dtrain" in answer.last_words:
        return f"the nodes' Python {python} has no dtrain. Install it there: {python} -m pip install dtrain"
    words = f": {answer.last_words}" if answer.last_words else ""
    return f"the nodes' Python {python} {answer.end}{words}. Take a working Python of 3.11 or newer that has dtrain."


# ---- the child ----


def _main() -> None:
    answer(json.loads(sys.stdin.buffer.read()))


def answer(request: Mapping[str, Any]) -> NoReturn:
    """Writes the answers to what standard output is at the call, and ends the process."""
    # What the user's modules print, from C too, must not mix with the answers; and nobody answers their questions.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.pop("PYTHONSAFEPATH", None)
    os.environ.update(file_values(request["secrets"]))
    sys.path[:0] = request["sys_path"]
    for index, check in enumerate(request["checks"]):
        print(json.dumps({"begun": index}), file=answers, flush=True)
        print(json.dumps({"messages": faults(TargetCheck(**check))}), file=answers, flush=True)
    print(json.dumps({"modules": _brought_in()}), file=answers, flush=True)
    os._exit(0)  # threads or exit handlers of the user's modules have no say


def _brought_in() -> list[dict[str, Any]]:
    """The top-level modules, as fields of a Module, that are neither the interpreter's nor installed."""
    installed = tuple({os.path.join(path, "") for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
    found = []
    for name, module in list(sys.modules.items()):
        if "." in name or name in ("dtrain", "__main__", "__mp_main__"):
            continue
        paths = list(getattr(module, "__path__", ()))
        place = str(paths[0]) if paths else str(getattr(module, "__file__", None) or "")
        if os.path.isabs(place) and not place.startswith(installed) and not _INSTALLED.search(place):
            found.append({"name": name, "folder": os.path.dirname(place), "package": bool(paths)})
    return found


if __name__ == "__main__":
    _main()
