"""The sections that the runtime owns: model, data, optimizer, schedule, train, checkpoint, recovery.

How a callable of the user's is named is targetconfig.py's, the model section modelconfig.py's. Reading a file of a
person's (layers, references, every check) is launcher/compose.py's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dtrain.cluster.bind import bind, bind_fields, plain, schema_of
from dtrain.cluster.configfile import Node, describe, is_broken, read_file, to_plain
from dtrain.cluster.errors import ConfigError, Problem
from dtrain.cluster.layers import TARGET_KEY
from dtrain.runtime.modelconfig import ModelConfig
from dtrain.runtime.targetconfig import Target as Target
from dtrain.strategies.config import ExactConfig, StrategyConfig

STREAM_KEYWORDS = ("stream", "num_streams")  # given to a data set's target that has both
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Built-in schedules are pure functions of the step. `schedule: cosine` is short for `{name: cosine}`; in a list of
    them one follows another, as in `[{name: constant, steps: 1000}, {name: cosine}]`."""

    SHORT: ClassVar[str] = "name"

    name: Literal["constant", "linear", "cosine", "wsd"] = field(
        default="constant",
        metadata={"doc": "how the learning rate goes after the warm-up; wsd: warm-up, stable, decay"},
    )
    warmup: int = field(default=0, metadata={"doc": "steps of linear rise from 0", "min": 0})
    decay: int = field(default=0, metadata={"doc": "wsd: the last steps, in which the rate falls", "min": 0})
    min_ratio: float = field(
        default=0.0, metadata={"doc": "the rate at the end over the peak rate", "min": 0.0, "max": 1.0}
    )
    steps: int | None = field(
        default=None,
        metadata={
            "doc": "in a list: how many steps it lasts, at the end of which the next begins; not of the last",
            "min": 1,
        },
    )


Schedules = ScheduleConfig | tuple[ScheduleConfig, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """One of `optimizer.groups`: the parameters that match get these settings; the first match wins."""

    match: str = field(metadata={"doc": "a pattern over fully qualified parameter names, like `*.bias`"})
    settings: dict[str, Any]
    schedule: Schedules | None = field(default=None, metadata={"doc": "in the place of the run's schedule"})

    @classmethod
    def from_node(cls, node: Node, key: str) -> tuple[ParamGroup | None, list[Problem]]:
        assert isinstance(node.value, dict)
        match = node.value.get("match")
        rest = {word: child for word, child in node.value.items() if word != "match"}
        if match is None or not isinstance(match.value, str):
            found = "it is missing" if match is None else f"found {describe(match)}"
            message = f'expects a pattern over parameter names, like "*.bias"; {found}.'
            known = match is not None and is_broken(match)
            place = match.where if match else node.where
            return None, [] if known else [Problem(where=place, key=f"{key}.match", message=message)]
        if not rest or "params" in rest:
            what = (
                "sets nothing: add a setting, like weight_decay: 0" if not rest else "params follow from match: drop it"
            )
            return None, [Problem(where=node.where, key=key, message=f"the group of {match.value!r} {what}.")]
        if is_broken(node):
            return None, []
        own = Node({"schedule": rest.pop("schedule", Node(None, node.where))}, node.where)
        bound, problems = bind_fields({"schedule": schema_of(cls)["schedule"]}, own, key)
        settings = {word: to_plain(child) for word, child in rest.items()}
        return None if problems else cls(match=match.value, settings=settings, **bound), problems

    def to_plain(self) -> dict[str, Any]:
        schedule = {} if self.schedule is None else {"schedule": plain(self.schedule)}
        return {"match": self.match, **self.settings, **schedule}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """`{_target_: ..., lr: ..., groups: [...]}`: all but `groups` is the target's."""

    SHORT: ClassVar[str] = TARGET_KEY

    target: Target = field(metadata={"doc": "called with the parameters first, like `torch.optim.AdamW`"})
    groups: tuple[ParamGroup, ...] = field(
        default=(),
        metadata={"doc": "`[{match: PATTERN, weight_decay: 0, ...}]`: other settings, or another schedule, for some"},
    )

    @classmethod
    def from_node(cls, node: Node, key: str) -> tuple[OptimizerConfig | None, list[Problem]]:
        assert isinstance(node.value, dict)
        own = {word: child for word, child in node.value.items() if word != "groups"}
        target, problems = Target.from_node(Node(own, node.where), key)
        listed = Node({word: child for word, child in node.value.items() if word == "groups"}, node.where)
        bound, found = bind_fields({"groups": schema_of(cls)["groups"]}, listed, key)
        if target is None or "groups" not in bound:
            return None, [*problems, *found]
        return cls(target=target, groups=bound["groups"]), [*problems, *found]

    def to_plain(self) -> dict[str, Any]:
        groups = {"groups": [group.to_plain() for group in self.groups]} if self.groups else {}
        return {**self.target.to_plain(), **groups}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    train: Target = field(
        metadata={"doc": "callable -> map-style Dataset (`__len__`, `__getitem__`), IterableDataset or other iterable"}
    )
    batch_size: int = field(
        metadata={"doc": "samples an optimizer step, over the whole job: the same at any world size", "min": 1}
    )
    eval: Target | None = field(default=None, metadata={"doc": "callable -> Dataset; see train.eval_every"})
    collate: Target | None = field(
        default=None, metadata={"doc": "callable(list of samples) -> batch; left out: torch's default_collate"}
    )
    forward: Target | None = field(
        default=None,
        metadata={
            "doc": "callable(model, batch) -> output, where no plain call of the model fits; it calls `model(...)`"
        },
    )
    workers: int = field(
        default=0, metadata={"doc": "loader processes a rank; 0: samples are read between steps", "min": 0}
    )
    shuffle: bool = field(
        default=True,
        metadata={
            "doc": "a new order every epoch, a pure function of seed and epoch; "
            "an iterable data set keeps the order that it gives"
        },
    )
    streams: int = field(
        default=1,
        metadata={
            "doc": "iterable data sets: parts that are read side by side and belong to the order of the samples, "
            "like one a file; a multiple of the ranks, and each part is read once",
            "min": 1,
        },
    )
    resume: Literal["state", "skip", "restart"] = field(
        default="state",
        metadata={
            "doc": "how an iterable data set is put back. state: by its `load_state_dict`; skip: what was used is read "
            "again and dropped; restart: its epoch begins again, which is not exact"
        },
    )


def check_metric_name(name: str) -> None:
    """Of a metric in the config: `loss`, or a name that the metrics callable gives. Raises ValueError."""
    if not name.strip():
        raise ValueError('expects the name of a metric: "loss", or one that `metrics` returns.')


_METRIC = {"doc": "`loss`, or a name that `metrics` returns", "validate": check_metric_name}
_MODE = {"doc": "`min`: lower is better; `max`: higher is"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopConfig:
    """`early_stop: loss` is short for `{metric: loss}`."""

    SHORT: ClassVar[str] = "metric"

    metric: str = field(default="loss", metadata=_METRIC)
    mode: Literal["min", "max"] = field(default="min", metadata=_MODE)
    patience: int = field(
        default=3,
        metadata={"doc": "evaluations in a row without an improvement, after which the run is done", "min": 1},
    )
    min_delta: float = field(
        default=0.0, metadata={"doc": "what is less than this much better is no improvement", "min": 0.0}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = field(metadata={"doc": "optimizer steps of the whole run", "min": 1})
    seed: int = field(
        default=0, metadata={"doc": "initial weights, sample order and random numbers follow from it", "min": 0}
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32",
        metadata={
            "doc": "bf16, fp16: autocast for the forward, parameters and optimizer state stay fp32; "
            "fp16 with dynamic loss scaling: a step that overflows is skipped"
        },
    )
    activation_checkpointing: Literal["none", "full"] = field(
        default="none",
        metadata={
            "doc": "full: of each unit (see strategy.wrap) only its input is kept for the backward, which computes the "
            "rest again: less memory, about a third more computing, the same numbers"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "doc": "torch.compile for each unit (see strategy.wrap), or the whole model where it has none; "
            "on a CPU it needs a C++ compiler"
        },
    )
    clip_grad_norm: float | None = field(
        default=None, metadata={"doc": "the global gradient norm is clipped to this", "min": 0.0}
    )
    micro_batch: int | None = field(
        default=None,
        metadata={
            "doc": "samples that one forward sees at most; the accumulation follows; left out: all at once",
            "min": 1,
        },
    )
    exact: ExactConfig | None = field(
        default=None,
        metadata={
            "doc": "`{shards: L}`: the same bits with single, ddp and fsdp on any number of ranks up to L, resumed or "
            "not; see docs/exact.md"
        },
    )
    eval_every: int | None = field(
        default=None, metadata={"doc": "steps between evaluations over data.eval; left out: at the end only", "min": 1}
    )
    early_stop: EarlyStopConfig | None = field(
        default=None,
        metadata={"doc": "`{metric, mode, patience, min_delta}`: ends the run when evaluations no longer improve"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Between two saves: so many steps or so many seconds; the other one is None."""

    steps: int | None = None
    seconds: float | None = None


def parse_interval(every: int | str) -> Interval:
    """`100`: steps; `30s`, `10min`, `2h`: time. Raises ValueError with what to write."""
    if isinstance(every, int):
        if every < 1:
            raise ValueError(f"expects at least 1 step, found {every}. Leave it out to save at the end only.")
        return Interval(steps=every)
    match = _DURATION.fullmatch(every.strip())
    if not match:
        raise ValueError(f'expects steps (100) or a time (30s, 10min, 2h), found "{every}".')
    seconds = float(match[1]) * _UNIT_S[match[2]]
    if seconds <= 0:
        raise ValueError(f'expects a time above zero, found "{every}". Leave it out to save at the end only.')
    return Interval(seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestConfig:
    """`best: loss` is short for `{metric: loss}`."""

    SHORT: ClassVar[str] = "metric"

    metric: str = field(default="loss", metadata=_METRIC)
    mode: Literal["min", "max"] = field(default="min", metadata=_MODE)
    keep: int = field(default=1, metadata={"doc": "how many of the best to keep", "min": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    url: str = field(default="${run_dir}/checkpoints", metadata={"doc": "where checkpoints go: a path or file:// URL"})
    every: int | str | None = field(
        default=None,
        metadata={
            "doc": "steps (`100`) or time (`30s`, `10min`, `2h`) between saves; left out: end only",
            "validate": parse_interval,
        },
    )
    keep: int | None = field(default=3, metadata={"doc": "newest checkpoints to keep; null: all of them", "min": 1})
    best: BestConfig | None = field(
        default=None,
        metadata={"doc": "`{metric, mode, keep}`: saves at each evaluation and keeps the best ones besides the newest"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    max_restarts_without_progress: int = field(
        default=3, metadata={"doc": "restarts in a row with no new step, after which the run fails", "min": 0}
    )
    workers: Literal["auto", "warm", "exec"] = field(
        default="auto",
        metadata={
            "doc": "warm: forked from a process that has imported torch; exec: started plainly; auto: exec for a script"
        },
    )


def check_name(name: str) -> None:
    """A run's name becomes part of paths and job names. Raises ValueError."""
    if not _NAME.fullmatch(name):
        fitting = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:100] or "my-run"
        raise ValueError(
            f'expects up to 100 letters, digits, ".", "_" or "-", a letter or digit first; found "{name}". '
            f"For example: name: {fitting}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All that a worker needs to train: what crosses to the nodes as config.yaml."""

    name: str = field(metadata={"doc": "a label; left out: the file's stem", "validate": check_name})
    model: ModelConfig = field(metadata={"doc": "a target, callable -> `torch.nn.Module`; `init_from` and `frozen`"})
    data: DataConfig = field(metadata={"doc": "what is learned from"})
    optimizer: OptimizerConfig = field(metadata={"doc": "a target, called with the parameters first; and `groups`"})
    train: TrainConfig = field(metadata={"doc": "how long, and with which numbers"})
    loss: Target | None = field(
        default=None,
        metadata={"doc": "callable(output, batch) -> scalar mean, or (sum, count); left out: `output.loss`"},
    )
    count: Target | None = field(
        default=None,
        metadata={
            "doc": "callable(batch) -> what the loss is a mean over; left out: samples, for `output.loss` the "
            "`labels` that are not -100"
        },
    )
    loss_closure: Target | None = field(
        default=None,
        metadata={
            "doc": "callable(model, batch) -> scalar mean, or (sum, count): instead of `loss` and `data.forward`, for "
            "a loss that needs the model; it calls `model(...)`"
        },
    )
    metrics: Target | None = field(
        default=None,
        metadata={
            "doc": "callable(output, batch) -> `{name: scalar mean, or (sum, count)}`: means over data.eval at each "
            "evaluation"
        },
    )
    schedule: ScheduleConfig | Target | tuple[ScheduleConfig, ...] = field(
        default_factory=ScheduleConfig,
        metadata={
            "doc": "a built-in learning-rate schedule, a list of them, or callable(optimizer, ...) -> LRScheduler"
        },
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig, metadata={"doc": "where and how often the state is saved"}
    )
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig, metadata={"doc": "what happens after a failure"})
    track: tuple[Literal["tensorboard", "mlflow"], ...] = field(
        default=(), metadata={"doc": "where metrics.jsonl is shown besides: `[tensorboard, mlflow]`"}
    )
    on_end: Target | None = field(
        default=None,
        metadata={"doc": "callable(model), on every rank after the last step; a text that it returns is printed"},
    )


def read_run_config(path: str | os.PathLike[str]) -> tuple[RunConfig, StrategyConfig]:
    """The run directory's config.yaml, which is resolved: no references, nothing to look up. Raises ConfigError."""
    node, problems = read_file(path)
    if node is None or not isinstance(node.value, dict):
        raise ConfigError(problems)
    elsewhere = ("run_dir", "cluster", "strategy")  # the launcher's, the back end's, and bound below
    run = {key: child for key, child in node.value.items() if key not in elsewhere}
    values, run_problems = bind_fields(schema_of(RunConfig), Node(run, node.where))
    strategy, strategy_problems = bind(StrategyConfig, node.value.get("strategy", Node({}, node.where)), "strategy")
    problems = [*problems, *run_problems, *strategy_problems]
    if problems or strategy is None:
        raise ConfigError(problems)
    return RunConfig(**values), strategy
