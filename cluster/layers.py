"""Layers of a config: trees merged left to right, and `key.path=value` words as a layer. Pure.

Short forms (`strategy: ddp`) are known to the schema, not here: the caller passes `expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dtrain.cluster.configfile import Node, Scalar, from_plain, read_text
from dtrain.cluster.errors import Problem

TARGET_KEY = "_target_"
COMMAND_LINE = "command line"
Expand = Callable[[Node], Node]


def merge_layers(layers: Sequence[Node], expand: Expand) -> tuple[Node, list[Problem]]:
    """Later layers win. Mappings merge key by key, everything else replaces.

    `expand` writes out short forms of what has been merged so far, so that `strategy.shard=2` finds a mapping where
    the file says `strategy: fsdp`, while `strategy=ddp` still replaces all of a mapping.
    """
    problems: list[Problem] = []
    merged = Node({}, layers[0].where if layers else "")
    for layer in layers:
        merged = expand(merge(merged, layer, problems))
    return merged, problems


def merge(base: Node, over: Node, problems: list[Problem], path: tuple[str, ...] = (), *, part: bool = False) -> Node:
    """`over` on `base`. A mapping with another `_target_` inherits nothing; keys of digits address items of a list.

    `part`: `base` is not a config yet but words of the command line, whose order within one target does not matter.
    """
    by_index = isinstance(over.value, dict) and over.value and all(key.isdigit() for key in over.value)
    if isinstance(base.value, list) and isinstance(over.value, dict) and by_index:
        return _merge_items(base, base.value, over.value, problems, path)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or over.replaces:
        return over
    old_target, new_target = base.value.get(TARGET_KEY), over.value.get(TARGET_KEY)
    if new_target and (old_target.value != new_target.value if old_target else not part):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child, problems, (*path, key), part=part) if key in merged else child
    return Node(merged, base.where, replaces=base.replaces)


def _merge_items(
    base: Node, items: list[Node], over: dict[str, Node], problems: list[Problem], path: tuple[str, ...]
) -> Node:
    merged = list(items)
    for key, child in over.items():
        index = int(key)
        if index >= len(merged):
            message = f"there is no item {index}: the list at {base.where} has {len(merged)} (counted from 0)."
            problems.append(Problem(where=child.where, key=".".join((*path, key)), message=message))
        else:
            merged[index] = merge(merged[index], child, problems, (*path, key))
    return replace(base, value=merged)


def parse_overrides(words: Sequence[str], expand: Expand) -> tuple[Node, list[Problem]]:
    """One layer of all `key.path=value` words; values are YAML, later words win."""
    problems: list[Problem] = []
    layer = Node({}, COMMAND_LINE)
    for word in words:
        tree = _parse_override(word, problems)
        if tree is not None:
            layer = expand(merge(layer, tree, problems, part=True))
    return layer, problems


def _parse_override(word: str, problems: list[Problem]) -> Node | None:
    key, equals, text = word.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        message = f"expects key.path=value, found {word!r}. For example: train.steps=100"
        problems.append(Problem(where=COMMAND_LINE, key="", message=message))
        return None
    node, found = read_text(text, COMMAND_LINE, lines=False)
    for problem in found:
        place = ".".join([*path, problem.key] if problem.key else path)
        hint = "" if problem.key or node is not None else f" Put quotes around it: {key}='\"{text}\"'"
        problems.append(Problem(where=COMMAND_LINE, key=place, message=problem.message + hint))
    if node is None:
        return None
    for part in reversed(path):
        node = Node({part: node}, COMMAND_LINE)
    return node


def layer_of(values: Mapping[str, Scalar], where: str) -> Node:
    """A layer that sets some dotted keys from one place, like {"cluster.nodes": 2} from "--nodes"."""
    layer = Node({}, where)
    for key, value in values.items():
        node = from_plain(value, where)
        for part in reversed(key.split(".")):
            node = Node({part: node}, where)
        layer = merge(layer, node, [])
    return layer
