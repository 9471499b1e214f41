"""A process that has imported torch and waits: on one machine, the target check and all simulated nodes are its forks,
so that the imports are paid for once. The other end is cluster/zygote.py, in the launching process.

    python -m dtrain.runtime.zygote --fd N --parent PID --preload torch,...

Messages are those of runtime/forkserver.py, but
    in    {"fork": index, "entry": "module:function", "argument": ..., "environ": {...}, "cwd": path}, descriptors for
          stdout and stderr attached; the function is called with the argument and returns the exit code.
          What comes before "ready" is answered after the import that is under way
Its children outlive it.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from typing import Any

from dtrain.cluster.procs import unblock_stops
from dtrain.runtime import agent
from dtrain.runtime.forkserver import Server, become_warm_parent, become_worker, serve_from_command_line
from dtrain.runtime.warm import WarmParent


def become(message: dict[str, Any], fds: list[int], parent: int) -> int:
    """Leads a session of its own, with SIGTERM and SIGINT blocked. Does not die with the zygote."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for source, target in zip(fds, (1, 2), strict=True):
        os.dup2(source, target)
    os.environ.update(message["environ"])
    os.chdir(message["cwd"])
    module, _, name = message["entry"].partition(":")
    return int(getattr(importlib.import_module(module), name)(message["argument"]))


def node(argv: list[str]) -> int:
    """Entry point of a node: its agent, with a warm parent that is a fork of it, so that it dies with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()  # before the agent has any thread, loop or connection
    if pid == 0:
        code = 1
        try:
            ours.close()
            become_warm_parent(os.getppid(), "dtrain warm")
            theirs.send(b'{"ready": 0.0}')
            Server(theirs, become_worker).serve()
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    return agent.main(argv, WarmParent(pid=pid, channel=ours))


def check(argument: dict[str, Any]) -> int:
    """Entry point of a short errand in the user's own code: stops end it as they end any program."""
    unblock_stops()
    module, _, name = argument["entry"].partition(":")
    return int(getattr(importlib.import_module(module), name)(argument["request"]))


if __name__ == "__main__":
    sys.exit(serve_from_command_line("dtrain zygote", become, keep_children=True))
