"""One rank that is a script of the user's: everything as torchrun would have it, and its end told to the agent. What a
script may tell us of itself while it runs is runtime/session.py's; the store behind MASTER_PORT is scriptstore.py's.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.cluster.workerenv import WorkerEnv, script_environ
from dtrain.runtime import session
from dtrain.runtime.progress import Phase, ProgressWriter
from dtrain.runtime.report import Reporter
from dtrain.runtime.scriptconfig import Script, find_script, parse_script, read_script_config
from dtrain.runtime.stopflag import StopFlag, stop_flag

if TYPE_CHECKING:
    from dtrain.runtime.scriptstore import ScriptStore


def main(env: WorkerEnv) -> int:
    """Never raises: how the script ended is reported and becomes the exit code."""
    report = Reporter(env.report_fd)
    progress = ProgressWriter(env.progress_fd, attempt=env.attempt, global_rank=env.global_rank)
    try:
        return _run(env, report, progress)
    except BaseException as error:
        return _report_failure(error, report)


def _run(env: WorkerEnv, report: Reporter, progress: ProgressWriter) -> int:
    run = RunDir(env.run_dir)
    config = read_script_config(run.config)
    script = parse_script(config.script)
    os.environ.update(script_environ(env, os.environ))
    session.attach(env, config, report, progress)
    if env.global_rank == 0:
        _open_store(env)
    if _asked_to_stop_already():
        return exits.STOPPED
    progress.phase(Phase.SCRIPT)
    code = _exit_code_of(script, _take_folders(run), report)
    progress.phase(Phase.FINISHING)
    together = code in (exits.DONE, exits.STOPPED) and env.world_size > 1
    store = _open_store(env) if together else None  # now: a script may have done without torch, which is imported here
    if code in (exits.DONE, exits.STOPPED):
        session.close()
        _end_threads()
    if store is not None:
        store.wait_for_all()
    return code


def _end_threads() -> None:
    """What the interpreter does before it ends: waits for threads, and has pools end theirs. Private, but there is no
    other way to it; multiprocessing's children do the same. Afterwards much can't be imported any more."""
    cast(Any, threading)._shutdown()


@cache  # rank 0's serves until the process ends: what the script leaves to exit handlers may need it
def _open_store(env: WorkerEnv) -> ScriptStore:
    from dtrain.runtime.scriptstore import ScriptStore  # imports torch, which a script may want to do later itself

    return ScriptStore(env)


def _asked_to_stop_already() -> bool:
    """From here on a SIGTERM is the script's affair: it ends the process, unless the script asks for it to be kept in
    mind (session.stop_requested) or handles it in its own way."""
    flag: StopFlag = stop_flag()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return flag.is_set()


def _take_folders(run: RunDir) -> list[str]:
    """The folders in which scripts are looked for, taken off the module search path: a script's imports come from its
    own folder and the environment, as they would without us."""
    job = read_json(run.job) or {}
    count = len(job.get("sys_path", ()))
    folders, sys.path[:count] = sys.path[:count], []
    return folders


def _exit_code_of(script: Script, folders: Sequence[str], report: Reporter) -> int:
    """0 at the script's end, or what it gave to sys.exit. Raises what it raises."""
    try:
        if script.module:
            _run_module(script, folders)
        else:
            _run_file(script, folders)
        _save_what_is_in_flight()
    except SystemExit as stop:
        code = _number(stop)
        if code not in (exits.DONE, exits.STOPPED):
            stop.__traceback__ = _without_us(stop.__traceback__)
            report.failure(stop, kind="exit", retry=code != exits.NEVER_RETRY)
            return code
        _save_what_is_in_flight()
    else:
        code = exits.DONE
    return code


def _run_file(script: Script, folders: Sequence[str]) -> None:
    """As `python PATH ARGS`: the script is __main__, its folder comes first on the module search path."""
    path = find_script(script.path, folders)
    if path is None:
        raise UsageError(f"script: there is no {script.path} on this node. Looked in {' and '.join(folders)}")
    name = str(path)
    sys.path.insert(0, str(path.parent))
    sys.argv[:] = [name, *script.args]
    module = ModuleType("__main__")
    vars(module).update(__file__=name, __cached__=None, __loader__=SourceFileLoader("__main__", name))
    sys.modules["__main__"] = module
    with io.open_code(name) as file:
        code = compile(file.read(), name, "exec", dont_inherit=True)
    exec(code, vars(module))


def _run_module(script: Script, folders: Sequence[str]) -> None:
    """As `python -m MODULE ARGS`."""
    sys.path[:0] = folders
    sys.argv[:] = [script.module, *script.args]  # runpy puts the file's name in front
    runpy.run_module(script.module, run_name="__main__", alter_sys=True)


def _save_what_is_in_flight() -> None:
    """A save that the script did not wait for must not be lost, nor its failure be silent."""
    functional = sys.modules.get("dtrain.runtime.checkpoint.functional")
    if functional is not None:
        functional.wait()


def _number(stop: SystemExit) -> int:
    """As the interpreter treats it: None is 0, text goes to stderr and is 1."""
    if stop.code is None:
        return exits.DONE
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return exits.FAILED


def _report_failure(error: BaseException, report: Reporter) -> int:
    error.__traceback__ = _without_us(error.__traceback__)
    traceback.print_exception(error)
    if isinstance(error, SyntaxError) and error.filename:
        report.failure(error, where=f"{error.filename}:{error.lineno}")
    elif isinstance(error, UsageError):
        report.failure(error, kind="config")
        return exits.NEVER_RETRY
    else:
        report.failure(error)
    return exits.FAILED


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
        trace = trace.tb_next
    return trace
