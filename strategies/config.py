"""The `strategy:` section."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

# A word of `tensor_plan`: what is done to a module. Blocks: so many matrices in one.
TENSOR_WORD = re.compile(r"(?P<word>column|row|embedding|head|whole)(?: (?P<blocks>[1-9]))?")

StrategyName = Literal["auto", "single", "ddp", "fsdp", "horovod", "zero1", "zero2", "zero3"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


def _check_words(plan: dict[str, str]) -> None:
    for pattern, word in plan.items():
        found = TENSOR_WORD.fullmatch(word)
        if found is None or (found["blocks"] and found["word"] != "column"):
            raise ValueError(
                f"{pattern!r}: {word!r} is not one of column, column N (N matrices in one layer, like q, k and v), "
                "row, embedding, head, whole"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactConfig:
    """`train.exact: 8` is short for `{shards: 8}`."""

    SHORT: ClassVar[str] = "shards"

    shards: int = field(
        metadata={
            "doc": "logical parts of every global batch, which belong to the numbers as the seed does: choose the "
            "largest number of ranks that you will want",
            "min": 1,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyConfig:
    """How the model is spread over the ranks. `strategy: ddp` is short for `strategy: {name: ddp}`."""

    SHORT: ClassVar[str] = "name"

    name: StrategyName = field(
        default="auto",
        metadata={"doc": "auto: ddp if parameters, gradients and optimizer state fit the device's memory, else fsdp"},
    )
    replicate: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "copies of the model: with ddp and horovod one a rank; with fsdp each is cut over `shard` "
            "neighbouring ranks, inside a node where they fit; auto: all ranks, or what `shard` leaves (fsdp)",
            "min": 1,
        },
    )
    shard: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "fsdp: ranks over which a copy of the model is cut; auto: all of them, or what `replicate` leaves",
            "min": 1,
        },
    )
    tensor: int = field(
        default=1,
        metadata={
            "doc": "ddp and fsdp: neighbouring ranks that hold a part of each large layer and work on the same samples",
            "min": 1,
        },
    )
    tensor_plan: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "doc": "patterns of module names and how each is cut, like `{'*.up': column, '*.down': row}`: column (by "
            "outputs), column N (N matrices in one layer, like q, k and v), row (by inputs), embedding, head (column, "
            "its output on every rank), whole; left out: the plan that a Hugging Face model brings, else one by the "
            "shapes of the layers",
            "validate": _check_words,
        },
    )
    sequence_parallel: bool = field(
        default=False,
        metadata={
            "doc": "between layers that are cut by `tensor`, each of its ranks holds a part of every sequence: less "
            "memory for activations; `tensor` has to divide the length of sequences"
        },
    )
    offload: Literal["none", "cpu"] = field(
        default="none",
        metadata={
            "doc": "zero1, zero2, zero3: cpu keeps the optimizer's state and master weights in the node's memory, and "
            "the optimizer computes there"
        },
    )
    pipeline: int = field(
        default=1,
        metadata={
            "doc": "ddp and fsdp: ranks in a row that hold consecutive parts of the model, its stages; "
            "micro-batches (train.micro_batch) go through them",
            "min": 1,
        },
    )
    pipeline_schedule: ScheduleName = field(
        default="1f1b",
        metadata={
            "doc": "what a stage does when: gpipe (all forwards, then all backwards), 1f1b (in turn: fewer activations "
            "are kept), interleaved (in turn, with several stages a rank: less waiting, more sending)"
        },
    )
    pipeline_split: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "the first unit of every stage but the first, like `[blocks.4, blocks.8]`; left out: stages whose "
            "forwards cost the same number of operations, as nearly as can be"
        },
    )
    pipeline_stages: int | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "stages a rank; auto: 2 with interleaved, else 1", "min": 1},
    )
    wrap: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "patterns of the modules that are gathered (fsdp), computed again "
            "(train.activation_checkpointing) or compiled (train.compile) as one unit, like `blocks.*`; "
            "left out: every item of every outermost ModuleList or Sequential"
        },
    )
