"""Forks the ranks of all tests of a pytest process, so that torch and what else takes seconds is imported once.

Requests on stdin, a line of JSON each: {"do": "run" (rank_runner.py) or "ask" (rank_functions.py), "preload": modules
to import before the fork, "environ": of the ranks, ...}. The answer is a JSON list over the ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Sequence

import rank_functions
import rank_runner
import torch
import torch._dynamo  # which every optimizer imports when it is made
from rank_environ import adopted

HANDLERS = {"run": rank_runner.run, "ask": rank_functions.run}


def preload(modules: Sequence[str], environ: dict[str, str]) -> None:
    """What is imported already costs nothing."""
    if missing := [name for name in modules if name not in sys.modules]:
        with adopted(environ):
            for name in missing:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # as the parent of a node's workers does: collections in the forks leave all of this alone


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        preload(request["preload"], request["environ"])
        print(json.dumps(HANDLERS[request["do"]](request)), flush=True)
