"""How often in a row agents of a job have died without a word and without a new step in between. The coordinator's
memory counts what it lives to see; this counts what it does not."""

from __future__ import annotations

import json
from typing import Any

from dtrain.cluster.rundir import Control, read_json, write_atomic


def count_death(control: Control, whose: str) -> int:
    """Notes one more; how many there are now without progress. `whose`: a name, which has a count of its own."""
    path = control.path / f"{whose}-deaths.json"
    before, place = read_json(path) or {}, _place(read_json(control.path / "memory.json") or {})
    count = 1 if place > list(before.get("place", place)) else int(before.get("count", 0)) + 1
    write_atomic(path, json.dumps({"count": count, "place": place}), 0o600)
    return count


def _place(memory: dict[str, Any]) -> list[int]:
    return [int(memory.get("reached", 0)), int(memory.get("committed", 0))]
