"""What follows from the end of an attempt: go on, or end, and how. Pure, so that every case is a line of a table.

The memory is what one decision must know of those before; it lies in control/<job_id>/memory.json, so that the next
coordinator decides as this one would have.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dtrain.cluster import exits
from dtrain.cluster.backends import NODE_FAILURES
from dtrain.cluster.errors import CheckpointError, DtrainError, UsageError
from dtrain.runtime.culprit import Fact

# Where a disk or a device is broken, Python sees an exception; a wrong path has a class of its own.
_MACHINES = re.compile(r"(OSError|torch\.AcceleratorError): |RuntimeError: (CUDA|HIP|NCCL) error")

State = Literal["done", "stopped", "cancelled", "failed"]
Stop = Literal["stop", "cancel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    attempt: int = 0  # the attempt that runs, or ran last
    running: bool = False  # whether its outcome has not been decided yet
    reached: int = 0  # the furthest step that any attempt has worked on
    committed: int = 0  # the newest step that any attempt has committed
    stuck: int = 0  # attempts in a row that neither reached nor committed a new step
    signature: str = ""  # of the last failure, where it was an exception of the user's code
    suspect: int | None = None  # the node of the last failure, where that may be the machine's own
    strikes: int = 0  # such failures of it in a row
    blamed: int = -1  # the furthest step when a node was given up last: without a further one none is again
    skip: tuple[tuple[int, int], ...] = ()  # (step, attempt) of checkpoints found corrupt
    stop: Stop | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Memory:
        return Memory(**{**data, "skip": tuple((int(step), int(attempt)) for step, attempt in data["skip"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended. `culprit` None: every worker ended with 0 or 85, or was told to."""

    reached: int
    done: int = 0  # the furthest step that was finished
    from_step: int = 0  # the step of the checkpoint that the attempt began with
    committed: int = 0
    codes: frozenset[int] = frozenset()
    culprit: Fact | None = None
    stopped_early: str = ""  # why the workers left before the last step, done
    nodes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`state` None: start a new attempt; without the node `give_up`, where there is one and that can be."""

    memory: Memory
    reason: str
    give_up: int | None = None
    state: State | None = None
    exit_code: int = exits.DONE


def decide(memory: Memory, outcome: Outcome, max_stuck: int, *, script: bool = False) -> Decision:
    """One decision an attempt. `max_stuck`: recovery.max_restarts_without_progress. `script`: the workers are not ours;
    one that was asked to stop may well end with 0 before its work is done, so that counts as stopped."""
    known = replace(
        memory,
        running=False,
        reached=max(memory.reached, outcome.reached),
        committed=max(memory.committed, outcome.committed),
    )
    culprit = outcome.culprit
    if culprit is None and outcome.codes == {exits.DONE} and not (script and memory.stop):
        reason = "the script ended with 0" if script else outcome.stopped_early or "all steps are done"
        return Decision(memory=known, state="done", exit_code=exits.DONE, reason=reason)
    if memory.stop is not None:
        return stopped(known, "" if culprit is None else _unsaved(outcome, culprit))
    if culprit is None:
        return Decision(memory=known, state="stopped", exit_code=exits.STOPPED, reason="the workers were told to stop")
    return _after_failure(memory, known, culprit, max_stuck, outcome.nodes)


def stopped(memory: Memory, note: str = "") -> Decision:
    """The end of a run that a person or a scheduler asked for."""
    if memory.stop == "cancel":
        return Decision(memory=memory, state="cancelled", exit_code=exits.CANCELLED, reason=f"cancelled{note}")
    return Decision(memory=memory, state="stopped", exit_code=exits.STOPPED, reason=f"stopped on request{note}")


def given_up(memory: Memory, error: Exception) -> Decision:
    """The end by what neither a node nor a worker did: a store or a disk that fails, or a mistake of ours."""
    known = isinstance(error, DtrainError | OSError)
    reason = str(error) if known else f"an error inside dtrain: {error!r}; see logs/agent-*.log"
    code = exits.NEVER_RETRY if isinstance(error, UsageError | CheckpointError) else exits.FAILED
    return Decision(memory=memory, state="failed", exit_code=code, reason=reason)


def _unsaved(outcome: Outcome, culprit: Fact) -> str:
    """What a stop that went wrong has cost; nothing where no step was finished since the newest checkpoint."""
    lost = outcome.done > max(outcome.from_step, outcome.committed)
    return f"; its last steps were not saved: {_summary(culprit)}" if lost else ""


def _after_failure(memory: Memory, known: Memory, culprit: Fact, max_stuck: int, nodes: int) -> Decision:
    if not culprit.retry:
        return _never(known, f"{_summary(culprit)}. Starting again would fail again")
    damaged = _damaged_checkpoint(culprit)
    if damaged is not None and damaged not in memory.skip:
        reason = f"the checkpoint of step {damaged[0]} is damaged and is passed over"
        return Decision(memory=replace(known, skip=(*memory.skip, damaged), signature=""), reason=reason)
    known = _count_strikes(known, culprit)
    given_up = known.strikes >= NODE_FAILURES and nodes > 1 and known.reached > known.blamed
    signature = _signature(culprit)
    if signature and signature == memory.signature and not given_up:
        return _never(known, f"the same exception twice at step {culprit.step}: {culprit.message}")
    progressed = known.reached > memory.reached or known.committed > memory.committed
    stuck = 0 if progressed else memory.stuck + 1
    after = replace(known, stuck=stuck, signature=signature)
    if stuck > max_stuck:
        reason = f"{stuck} attempts in a row without a new step; the last one: {_summary(culprit)}"
        return Decision(memory=after, state="failed", exit_code=exits.FAILED, reason=reason)
    if given_up:
        after = replace(after, suspect=None, strikes=0, blamed=known.reached, signature="")
        reason = f"node {culprit.node} failed {known.strikes} times in a row, the last time {_summary(culprit)}"
        return Decision(memory=after, reason=reason, give_up=culprit.node)
    return Decision(memory=after, reason=_summary(culprit))


def _count_strikes(memory: Memory, culprit: Fact) -> Memory:
    machines_own = culprit.kind in ("signal", "start", "node_lost") or _MACHINES.match(culprit.message)
    if culprit.victim or not machines_own:
        return replace(memory, suspect=None, strikes=0)
    return replace(memory, suspect=culprit.node, strikes=memory.strikes + 1 if culprit.node == memory.suspect else 1)


def _never(memory: Memory, reason: str) -> Decision:
    return Decision(memory=memory, state="failed", exit_code=exits.NEVER_RETRY, reason=reason)


def _damaged_checkpoint(culprit: Fact) -> tuple[int, int] | None:
    if culprit.kind != "corrupt_checkpoint" or not {"step", "attempt"} <= culprit.data.keys():
        return None
    return int(culprit.data["step"]), int(culprit.data["attempt"])


def _signature(culprit: Fact) -> str:
    """Equal for the same exception at the same place and step; empty for what is not the user's code's doing."""
    if culprit.kind not in ("exception", "nonfinite", "exit") or culprit.victim:
        return ""
    if culprit.kind == "nonfinite":  # any of the ranks may be the one that is named
        return f"{culprit.step}|nonfinite"
    message = re.sub(r"0x[0-9a-fA-F]+", "0x", culprit.message)  # addresses differ between processes
    return f"{culprit.step}|{culprit.where}|{message}"


def _summary(culprit: Fact) -> str:
    who = f"node {culprit.node}" if culprit.global_rank is None else f"rank {culprit.global_rank}"
    return f"{who}: {culprit.message.splitlines()[0] if culprit.message else culprit.kind}"
