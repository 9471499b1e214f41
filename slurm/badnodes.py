"""Nodes that a run has lost: control/<job_id>/bad-nodes.json, by Slurm's names, with how often and why. One that failed
several times is left out from then on; after one failure it may serve again, and Slurm keeps dead ones away by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from dtrain.cluster.backends import NODE_FAILURES
from dtrain.cluster.rundir import Control, read_json, write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNode:
    count: int
    reason: str  # of the last time
    incarnation: int  # in which it failed last
    at: float
    went_on: bool = False  # that start of the job, with the others
    alive: bool = False  # it was there, but spoiled every attempt


def _path(control: Control) -> Path:
    return control.path / "bad-nodes.json"


def bad_nodes(control: Control) -> dict[str, BadNode]:
    return {name: BadNode(**record) for name, record in (read_json(_path(control)) or {}).items()}


def note_bad(
    control: Control, name: str, reason: str, incarnation: int, *, went_on: bool = False, alive: bool = False
) -> None:
    """Counts once an incarnation; a node that lives is only given up after several failures, and they all count."""
    known = bad_nodes(control)
    before = known.get(name)
    if before is None or before.incarnation != incarnation:
        count = (0 if before is None else before.count) + (NODE_FAILURES if alive else 1)
        at = round(time.time(), 3)
        known[name] = BadNode(count=count, reason=reason, incarnation=incarnation, at=at, went_on=went_on, alive=alive)
    write_atomic(_path(control), json.dumps({name: asdict(node) for name, node in known.items()}), 0o600)


def lost_in(known: dict[str, BadNode], incarnation: int) -> str:
    """Why this start of the job goes no further; "" where it has lost no node."""
    lost = {name: node for name, node in known.items() if node.incarnation == incarnation and not node.went_on}
    return "; ".join(f"{name}: {node.reason}" for name, node in lost.items())


def excluded(known: dict[str, BadNode], own: Collection[str], room: int) -> list[str]:
    """Nodes to do without: the user's own choice, and those that failed too often, the worst first, as long as `room`
    nodes more than needed are left."""
    worst = sorted((name for name in known if known[name].count >= NODE_FAILURES), key=lambda name: -known[name].count)
    chosen = [name for name in own if name not in known]  # those that we have asked to leave out ourselves are no wish
    return [*chosen, *worst[: max(0, room - len(chosen))]]


def note_text(known: dict[str, BadNode]) -> str:
    """A line for `status`."""
    return "; ".join(
        f"without {name}, which failed {node.count} times: {node.reason}"
        for name, node in known.items()
        if node.count >= NODE_FAILURES
    )
