"""What is cleared of a job's control directory when its engine starts the job again, on whichever machines."""

from __future__ import annotations

import json

from dtrain.cluster.rundir import Control, read_json, remove, write_atomic


def drop_nodes(control: Control) -> None:
    """Whoever serves a node from now on puts itself down anew."""
    for record in (*control.path.glob("node-*.json"), *control.path.glob("without-*")):
        remove(record)


def forget_stop(control: Control) -> None:
    """The stop of an earlier start was for that one, and node ranks were other machines. What the coordinator
    has learned of the run's progress stays."""
    path = control.path / "memory.json"
    memory = read_json(path)
    if memory is not None:
        write_atomic(path, json.dumps({**memory, "stop": None, "suspect": None, "strikes": 0}), 0o600)
