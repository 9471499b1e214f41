"""The `model:` section: a target, and what is done to the module that it returns before training begins.

Reading the weights is pretrained.py's; freezing, build.py's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dtrain.cluster.bind import bind_fields, plain, schema_of
from dtrain.cluster.configfile import Node
from dtrain.cluster.errors import Problem
from dtrain.cluster.layers import TARGET_KEY
from dtrain.runtime.targetconfig import Target


def check_map(renames: dict[str, str]) -> None:
    """Raises ValueError for a pattern that is no regular expression."""
    for pattern in renames:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is no regular expression: {error}. For example: '^transformer\\.': '' drops a prefix."
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where a run that starts from the beginning takes its weights. `init_from: URL` is short for
    `init_from: {url: URL}`."""

    SHORT: ClassVar[str] = "url"

    url: str = field(
        metadata={"doc": "a Hugging Face folder, other safetensors files in a folder, or one such file: a path or URL"}
    )
    map: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "doc": "`{regular expression: replacement}`, in order: names there -> names in this model",
            "validate": check_map,
        },
    )
    fresh: tuple[str, ...] = field(
        default=(), metadata={"doc": "patterns of parameters that keep their initial values, like `classifier.*`"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`{_target_: ..., width: ...}`: all but `init_from`, `frozen` and `deferred_init` is the target's."""

    SHORT: ClassVar[str] = TARGET_KEY

    target: Target = field(metadata={"doc": "callable -> `torch.nn.Module`"})
    init_from: InitConfig | None = field(
        default=None, metadata={"doc": "the weights to start from; a run that continues has its own"}
    )
    frozen: tuple[str, ...] = field(
        default=(), metadata={"doc": "patterns of parameters that are not trained, like `*.embed*`"}
    )

    deferred_init: bool = field(
        default=False,
        metadata={
            "doc": "build the model without memory for its large tensors: each rank makes only the parts that it "
            "holds, with the same bits (fsdp, tensor, pipeline: for a model that fits on no single rank)"
        },
    )

    @classmethod
    def from_node(cls, node: Node, key: str) -> tuple[ModelConfig | None, list[Problem]]:
        assert isinstance(node.value, dict)
        schema = {name: spec for name, spec in schema_of(cls).items() if name != "target"}
        own = {word: child for word, child in node.value.items() if word not in schema}
        target, problems = Target.from_node(Node(own, node.where), key)
        reserved = {word: child for word, child in node.value.items() if word in schema}
        bound, found = bind_fields(schema, Node(reserved, node.where), key)
        if target is None or len(bound) < len(schema):
            return None, [*problems, *found]
        return cls(target=target, **bound), [*problems, *found]

    def to_plain(self) -> dict[str, Any]:
        """What nobody set is left out: a model's section is short."""
        init = {"init_from": plain(self.init_from)} if self.init_from else {}
        frozen = {"frozen": list(self.frozen)} if self.frozen else {}
        deferred = {"deferred_init": True} if self.deferred_init else {}
        return {**self.target.to_plain(), **init, **frozen, **deferred}
