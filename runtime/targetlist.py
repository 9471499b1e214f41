"""Every target of a config and how it will be called: looked at in a child process before a launch, and once more by
each worker before it builds anything. Only imports and signatures; nothing is constructed.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import STREAM_KEYWORDS, RunConfig, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCheck:
    """One target and how the runtime will call it."""

    key: str
    where: str
    target: str
    keywords: tuple[str, ...]
    num_positional: int
    instance: bool  # called many times, so a class is instantiated with the keywords alone
    settings: tuple[str, ...] = ()  # of an optimizer's groups
    offered: tuple[str, ...] = ()  # keywords that the runtime adds where the signature has them


def target_checks(run: RunConfig) -> list[TargetCheck]:
    """Every target of the config, with the way in which the runtime calls it."""
    schedule = run.schedule if isinstance(run.schedule, Target) else None
    table: tuple[tuple[str, Target | None, int, bool], ...] = (
        ("model", run.model.target, 0, False),
        ("data.train", run.data.train, 0, False),
        ("data.eval", run.data.eval, 0, False),
        ("data.collate", run.data.collate, 1, True),
        ("data.forward", run.data.forward, 2, True),
        ("optimizer", run.optimizer.target, 1, False),
        ("schedule", schedule, 1, False),
        ("loss", run.loss, 2, True),
        ("count", run.count, 1, True),
        ("loss_closure", run.loss_closure, 2, True),
        ("metrics", run.metrics, 2, True),
        ("on_end", run.on_end, 1, True),
    )
    settings = dict.fromkeys(name for group in run.optimizer.groups for name in group.settings)
    return [
        TargetCheck(
            key=key,
            where=target.where,
            target=target.target,
            keywords=tuple(target.kwargs),
            num_positional=num_positional,
            instance=instance,
            settings=tuple(settings) if key == "optimizer" else (),
            offered=STREAM_KEYWORDS if key in ("data.train", "data.eval") else (),
        )
        for key, target, num_positional, instance in table
        if target is not None
    ]


def faults(check: TargetCheck) -> list[str]:
    """What is wrong with it here; imports its module."""
    target = Target(target=check.target, kwargs=dict.fromkeys(check.keywords))
    found = targets.check(target, check.num_positional, instance=check.instance, offered=check.offered)
    return [message for message in (found, targets.check_settings(target, check.settings)) if message]


def refuse_faulty(run: RunConfig) -> None:
    """Raises UsageError with every fault: this node may have another environment than the one that submitted."""
    found = [f"{check.key}._target_: {message}" for check in target_checks(run) for message in faults(check)]
    if found:
        raise UsageError("on this node: " + "\n".join(found))
