"""What evaluations gave, kept beside the checkpoints: which is the best one, and which ones are to stay for it.

`evaluation.json` in a step's directory: the metrics by name (null where one was not finite), and by which rule the run
ranks its checkpoints. Put only if absent, after the evaluation; a checkpoint is whole without it. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dtrain.cluster.errors import AlreadyExists, CheckpointError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint import fields, names
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class BestRule:
    """`keep`: how many of the best stay whatever their age; 0: none for being good."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    keep: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    metrics: Mapping[str, float | None]
    rule: BestRule


def put_score(storage: Storage, step: int, attempt: int, score: Score) -> None:
    """The first one of a step stays: an evaluation that is repeated gives the same."""
    finite = {name: value if value is not None and math.isfinite(value) else None
              for name, value in score.metrics.items()}  # fmt: skip
    raw = json.dumps({"metrics": finite, "best": asdict(score.rule)}, allow_nan=False).encode()
    with contextlib.suppress(AlreadyExists):
        storage.put_if_absent(names.score_key(names.step_dir(step, attempt)), raw)


def read_score(storage: Storage, directory: str) -> Score | None:
    """None where there is none, or none that can be read: a score is not worth an error."""
    key = names.score_key(directory)
    try:
        return _decode(fields.parse_object(storage.get(key), key), key)
    except (FileNotFoundError, CheckpointError):
        return None


def _decode(data: dict[str, Any], key: str) -> Score:
    metrics = fields.mapping(fields.get(data, "metrics", key), f"{key}: metrics")
    rule = fields.mapping(fields.get(data, "best", key), f"{key}: best")
    return Score(
        metrics={
            name: None if value is None else fields.number(value, f"{key}: {name}") for name, value in metrics.items()
        },
        rule=BestRule(
            metric=str(rule.get("metric")),
            mode="max" if rule.get("mode") == "max" else "min",
            keep=fields.integer(rule.get("keep"), f"{key}: best.keep"),
        ),
    )


class Scores:
    """The scores of a store, each read once: they never change. One that is not there yet is asked for again."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, Score] = {}

    def of(self, info: CheckpointInfo) -> Score | None:
        if info.dir not in self._known and (found := read_score(self._storage, info.dir)) is not None:
            self._known[info.dir] = found
        return self._known.get(info.dir)


def newest_rule(infos: Iterable[CheckpointInfo], scores: Scores) -> BestRule | None:
    """By which the run ranks, as its newest evaluation says; None where no live checkpoint was evaluated."""
    live = sorted((info for info in infos if info.live), key=lambda info: (info.step, info.attempt), reverse=True)
    return next((score.rule for info in live if (score := scores.of(info)) is not None), None)


def best_of(infos: Iterable[CheckpointInfo], scores: Scores, rule: BestRule) -> Sequence[CheckpointInfo]:
    """The live checkpoints whose metric is a finite number, the best one first; of equals the earlier one."""
    ranked = []
    for info in infos:
        score = scores.of(info) if info.live else None
        value = score.metrics.get(rule.metric) if score else None
        if value is not None and math.isfinite(value):
            ranked.append((value if rule.mode == "min" else -value, info.step, info.attempt, info))
    return [info for *_, info in sorted(ranked, key=lambda one: one[:3])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Of all checkpoints of a store. `metrics` and `best` by directory; `best`: those that the rule keeps, or the one
    that it would."""

    rule: BestRule
    metrics: Mapping[str, Mapping[str, float | None]]
    best: frozenset[str]


def rank(infos: Sequence[CheckpointInfo], scores: Scores) -> Ranking:
    rule = newest_rule(infos, scores) or BestRule()
    found = {info.dir: score.metrics for info in infos if (score := scores.of(info)) is not None}
    best = best_of(infos, scores, rule)[: max(1, rule.keep)]
    return Ranking(rule=rule, metrics=found, best=frozenset(info.dir for info in best))


def find_best(storage: Storage) -> CheckpointInfo:
    """The best live checkpoint, by the rule of the newest evaluation. Raises CheckpointError where there is none."""
    infos, scores = live_checkpoints(storage), Scores(storage)
    rule = newest_rule(infos, scores)
    ranked = best_of(infos, scores, rule) if rule else ()
    if not ranked:
        steps = ", ".join(str(info.step) for info in infos if info.live) or "none"
        raise CheckpointError(
            f"no live checkpoint in {storage.url} has an evaluation with a finite number. Live steps there: {steps}. "
            "checkpoint.best saves at each evaluation over data.eval"
        )
    return ranked[0]
