"""Words for a person: what an event, a failure, a step or a duration looks like on a screen. Pure; launcher/screen.py
puts it there."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dtrain.cluster import exits

Tone = Literal["plain", "quiet", "good", "bad"]
Event = Mapping[str, Any]

MAX_EVIDENCE_LINES = 40


@dataclass(frozen=True, slots=True)
class Said:
    """One line and how it is meant."""

    text: str
    tone: Tone = "plain"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24}h"


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def rate(per_s: float) -> str:
    if per_s < 1000:
        return f"{per_s:.3g}" if per_s < 100 else f"{per_s:.0f}"
    return f"{per_s / 1000:.1f}k" if per_s < 1e6 else f"{per_s / 1e6:.2f}M"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 'es' if word.endswith(('s', 'x')) else 's'}"


def number(record: Mapping[str, Any], key: str) -> str:
    """A loss as people read it; a number that is not finite is null in the record and named in `nonfinite`."""
    value = record.get(key)
    if isinstance(value, int | float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
    return str(record.get("nonfinite", {}).get(key, "?"))


def throughput(record: Mapping[str, Any]) -> str:
    for unit in ("tokens", "samples"):
        value = record.get(f"{unit}_per_s")
        if isinstance(value, int | float):
            return f"{rate(value)} {unit}/s"
    return ""


def metric_line(record: Mapping[str, Any], steps: int | None, eta_s: float | None) -> str:
    """`step  120/300  loss 2.7130  lr 3.0e-04  12.3k tokens/s  ETA 1m 20s`"""
    step = str(record["step"])
    parts = [f"step {step:>{len(str(steps))}}/{steps}" if steps else f"step {step}"]
    if "loss" in record:  # a script may report other numbers, or none
        parts.append(f"loss {number(record, 'loss')}")
    if isinstance(record.get("lr"), int | float):
        parts.append(f"lr {record['lr']:.1e}")
    if record.get("skipped"):
        parts.append(f"skipped: fp16 overflowed at loss scale {record.get('loss_scale')}")
    if speed := throughput(record):
        parts.append(speed)
    if eta_s is not None and record["step"] != steps:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def plain_interval(steps: int | None) -> int:
    """Steps between two plain lines: a round number that gives 20 to 30 of them for a whole run."""
    if not steps:
        return 10
    wanted = steps / 25
    decade = 10 ** max(0, math.floor(math.log10(wanted))) if wanted >= 1 else 1
    return min((decade * factor for factor in (1, 2, 5, 10)), key=lambda each: abs(math.log(each / max(wanted, 1))))


def event_lines(event: Event) -> list[Said]:
    """What the event looks like on a screen; nothing for kinds that are no news to a person, or not known."""
    show = _EVENTS.get(str(event.get("type")))
    return [] if show is None else show(event)


def _attempt_started(event: Event) -> list[Said]:
    origin = event.get("from")
    start = f"from step {origin['step']}" if origin else "from the beginning"
    nodes = event.get("nodes", 1)
    shape = f"{nodes_of(nodes, event.get('nodes_asked', nodes))}, {plural(event.get('world_size', 1), 'rank')}"
    if event.get("again"):
        return [Said(f"restarting {start} (attempt {event.get('attempt')}): {shape}")]
    return [Said(f"attempt {event.get('attempt')}: {shape}, {start}", "quiet")]


def nodes_of(nodes: int, asked: int) -> str:
    """Like `3 nodes`, or `2 of 3 nodes` where a run goes on with fewer."""
    return plural(nodes, "node") if nodes == asked else f"{nodes} of {plural(asked, 'node')}"


def _left_out(event: Event) -> list[Said]:
    spare = f", {event['spare']} to spare" if event.get("spare") else ""
    rest = f"{nodes_of(event.get('nodes', 1), event.get('nodes_asked', 1))}{spare}"
    return [Said(f"goes on with {rest}: {event.get('reason')}", "bad")]


def _workers_started(event: Event) -> list[Said]:
    how = "warm" if event.get("warm") else "plainly"
    return [Said(f"workers started {how} in {duration(event.get('seconds', 0.0))}", "quiet")]


def _chosen(event: Event) -> list[Said]:
    return [Said(f"  {line}") for line in event.get("lines", ())]


def _committed(event: Event) -> list[Said]:
    took = f"{size(event.get('bytes', 0))} in {duration(event.get('seconds', 0.0))}"
    return [Said(f"checkpoint of step {event.get('step')} committed: {took}", "quiet")]


def _evaluated(event: Event) -> list[Said]:
    metrics = event.get("metrics") or {}
    numbers = ", ".join(f"{key} {number(metrics, key)}" for key in metrics if key != "nonfinite")
    return [Said(f"evaluated at step {event.get('step')}: {numbers}", "good")]


def _stopping(event: Event) -> list[Said]:
    return [Said(f"stopping: {event.get('reason', 'asked to')}")]


_EVENTS: dict[str, Callable[[Event], list[Said]]] = {
    "attempt_started": _attempt_started,
    "workers_started": _workers_started,
    "chosen": _chosen,
    "resumed": lambda event: [Said(f"continues after step {event.get('step')}{_saved_by(event)}")],
    "checkpoint_committed": _committed,
    "checkpoint_passed_over": lambda event: [
        Said(f"checkpoint of step {event.get('step')} passed over: {event.get('message')}", "bad")
    ],
    "checkpoint_failed": lambda event: [Said(f"checkpoint failed: {event.get('message')}", "bad")],
    "tracking": lambda event: [Said(f"tracking: {event.get('message')}", "bad")],
    "evaluated": _evaluated,
    "failure": lambda event: failure_view(event),
    "restart": lambda event: [Said(f"restarting: {event.get('reason', '')}".rstrip(": "))],
    "node_lost": lambda event: [Said(f"node {_node(event)} is lost", "bad")],
    "node_left_out": _left_out,
    "node_replaced": lambda event: [Said(f"node {_node(event)}: {event.get('reason')}", "bad")],
    "nodes_excluded": lambda event: [Said(f"starts anew {event.get('reason')}", "bad")],
    "node_joined": lambda event: [Said(f"node {_node(event)} joined", "quiet")],
    "stopping": _stopping,
    "result": lambda event: [Said(line) for line in str(event.get("text", "")).splitlines()],
}


def _saved_by(event: Event) -> str:
    attempt = event.get("from_attempt", event.get("attempt"))
    ranks = f" by {event['strategy']} on {plural(event.get('world_size', 1), 'rank')}" if event.get("strategy") else ""
    return f", saved in attempt {attempt}{ranks}" if attempt is not None else ""


def _node(event: Event) -> Any:
    return event.get("node", event.get("node_rank", "?"))


def failure_view(event: Event) -> list[Said]:
    """The culprit first, then its evidence, the bystanders in one line."""
    rank = event.get("global_rank")
    who = f"node {event.get('node')}" if rank is None else f"rank {rank} on node {event.get('node')}"
    kind = str(event.get("kind", "failure"))
    lines = [Said(f"FAILURE: {', '.join([who, *_place(event)])}: {_KINDS.get(kind, kind)}", "bad")]
    message = str(event.get("message") or "").splitlines()
    lines += [Said(f"  {line}", "bad") for line in message[:10]]
    if event.get("where"):
        lines.append(Said(f"  at {event['where']}", "bad"))
    lines += [Said(f"  | {line}") for line in _bounded(_news(event.get("evidence") or (), message))]
    if collateral := event.get("collateral"):
        ranks = ", ".join(map(str, collateral[:16])) + (", ..." if len(collateral) > 16 else "")
        lines.append(Said(f"  brought down with it: {'rank' if len(collateral) == 1 else 'ranks'} {ranks}", "quiet"))
    return lines


_KINDS = {
    "exception": "raised an exception",
    "nonfinite": "the loss or gradient is not finite",
    "config": "the configuration does not fit",
    "corrupt_checkpoint": "a damaged checkpoint",
    "fenced": "a newer attempt has taken over",
    "signal": "killed by a signal",
    "exit": "ended early",
    "start": "its workers could not be started",
    "node_lost": "the node was lost",
}


def _place(event: Event) -> list[str]:
    if event.get("phase") == "finishing":  # the user's code that runs there is on_end
        return ["in on_end after the last step" if event.get("where") else "after the last step"]
    place = [f"step {event['step']}"] if event.get("step") is not None else []
    return place + ([f"in {event['phase']}"] if event.get("phase") else [])


def _news(evidence: Sequence[Any], message: Sequence[str]) -> list[str]:
    """The evidence's lines without an end that says the message again, be one of them with a few words before it."""
    lines = [line for entry in evidence for line in str(entry).rstrip("\n").splitlines()]
    if not message or len(lines) < len(message):
        return lines
    head, (first, *rest) = lines[: -len(message)], lines[-len(message) :]
    same = first == message[0] or first.endswith(f": {message[0]}") or message[0].endswith(f": {first}")
    return head if same and rest == list(message[1:]) else lines


def without_message(reason: str, failure: Event | None) -> str:
    """`reason` in few words where the failure's own lines are on the screen already: each message is said once."""
    message = str((failure or {}).get("message") or "")
    if not message or message.splitlines()[0] not in reason:
        return reason
    told = f"(?:{re.escape(message)}|{re.escape(message.splitlines()[0])})"
    rest = re.sub(rf"(?:; the last one: |: )?(?:(?:rank|node) \d+: )?{told}(?:\. )?", "", reason)
    rest = rest.removesuffix(" at step 0")  # which is no step: before the first, or after the last
    return rest[:1].lower() + rest[1:]


def _bounded(lines: Sequence[str]) -> list[str]:
    """A traceback says most at its end: what is too long loses its middle."""
    if len(lines) <= MAX_EVIDENCE_LINES:
        return list(lines)
    head = MAX_EVIDENCE_LINES // 4
    tail = MAX_EVIDENCE_LINES - head - 1
    return [*lines[:head], f"... {len(lines) - head - tail} lines left out ...", *lines[-tail:]]


def continue_command(argv: Sequence[str], launch_cwd: str, cwd: str, *, name: str, run_dir: str) -> str:
    """The command that continues a run, to be pasted where the person is now. `argv`: what launched it."""
    words, skip = [], False
    fresh = "--fresh" in argv
    for word in argv:
        if skip or word in ("--fresh", "--detach", "--continue-changed"):
            skip = False
        elif fresh and word in ("--name", "--run-dir"):
            skip = True
        elif not (fresh and word.startswith(("--name=", "--run-dir="))):
            words.append(word)
    if fresh:  # it went to a directory of its own: the command must go there too
        words += ["--name", name, "--run-dir", run_dir]
    command = shlex.join(words)
    return (
        command
        if os.path.realpath(launch_cwd) == os.path.realpath(cwd)
        else f"cd {shlex.quote(launch_cwd)} && {command}"
    )


def _with_steps(again: str, steps: int) -> str:
    return re.sub(r" train\.steps=\S+", "", again) + f" train.steps={steps}"


def outcome_lines(
    ended: Mapping[str, Any],
    *,
    steps: int | None,
    run_dir: str,
    url: str,
    again: str,
    failure: Mapping[str, Any] | None = None,
) -> list[Said]:
    """The last words of a run. `again`: the command that continues it; `failure`: what has just been shown."""
    state, step, reason = ended.get("state"), ended.get("step"), without_message(ended.get("reason") or "", failure)
    counted = step is not None and (step or steps)  # a script may count none, a node that fails has not
    at = f" at step {step}" + (f" of {steps}" if steps else "") if counted else ""
    why = f": {reason}" if reason and reason != state else ""  # "cancelled: cancelled" says nothing
    early = steps is not None and step is not None and step < steps
    lines = {
        "done": [Said(f"done{at}{why if early else ''}", "good")],
        "stopped": [Said(f"stopped{at}{why or ': its state is saved'}", "good")],
        "cancelled": [Said(f"cancelled{at}{why}", "bad")],
    }.get(str(state), [Said(f"{state}{at}{why}", "bad")])
    lines += [Said(f"  run dir      {run_dir}"), Said(f"  checkpoints  {url}")]
    if state == "done" and early:
        lines.append(Said(f"  train on:    {again} train.early_stop=null"))
    elif state == "done" and steps:
        lines.append(Said(f"  train on:    {_with_steps(again, 2 * steps)}"))
    elif state != "done":
        fix = "fix the cause, then " if ended.get("exit_code") == exits.NEVER_RETRY else ""
        lines.append(Said(f"  {fix}continue:  {again}"))
    return lines
