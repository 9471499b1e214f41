"""A Target stands for a callable of the user's: `_target_` names it, the other keys are passed to it as keywords.

What the name stands for, and whether the keywords fit its signature, is targets.py's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dtrain.cluster.configfile import Node, describe, is_broken, to_plain, walk
from dtrain.cluster.errors import Problem
from dtrain.cluster.layers import TARGET_KEY

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`{_target_: package.module.name, key: value, ...}`; `package.module.name` alone where there are no keywords."""

    SHORT: ClassVar[str] = TARGET_KEY
    MARK: ClassVar[str] = TARGET_KEY

    target: str
    kwargs: dict[str, Any]
    where: str = field(default="", compare=False)  # file:line, for messages

    @classmethod
    def from_node(cls, node: Node, key: str) -> tuple[Target | None, list[Problem]]:
        assert isinstance(node.value, dict)
        problems: list[Problem] = []
        name = node.value.get(TARGET_KEY)
        target_key = f"{key}.{TARGET_KEY}" if key else TARGET_KEY
        if name is None:
            message = f"is required and missing. Name a callable: {TARGET_KEY}: package.module.name"
            problems.append(Problem(where=node.where, key=target_key, message=message))
        elif not isinstance(name.value, str) or not _DOTTED.fullmatch(name.value):
            message = f"expects a dotted name like package.module.name, found {describe(name)}."
            problems.append(Problem(where=name.where, key=target_key, message=message))
        for path, child in walk(node):
            if len(path) > 1 and path[-1] == TARGET_KEY:
                message = "is inside another target, and nested targets are not built. Build it inside your callable."
                problems.append(Problem(where=child.where, key=".".join((key, *path)), message=message))
        if name is None or problems or is_broken(node):
            return None, problems
        kwargs = {word: to_plain(child) for word, child in node.value.items() if word != TARGET_KEY}
        return cls(target=str(name.value), kwargs=kwargs, where=name.where), problems

    def to_plain(self) -> dict[str, Any]:
        return {TARGET_KEY: self.target, **self.kwargs}
