"""The units of a model: the modules that are gathered (fsdp), computed again (activation checkpointing) or compiled as
one. Which they are follows from `strategy.wrap` and the model's own structure; what is done with them is their users'.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from dtrain.cluster.errors import UsageError


def units(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that are gathered as one, by name, inner ones first: those that match a pattern, else every item of
    every outermost ModuleList or Sequential, but for items that share a parameter with something outside.

    Raises UsageError for a pattern that matches nothing, or a module that can't be a unit.
    """
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(module)

    def shares(unit: nn.Module) -> bool:
        inside = set(unit.modules())
        return any(not owners[parameter] <= inside for parameter in unit.parameters())

    if not patterns:
        return [(name, module) for name, module in _items(model) if not shares(module)]
    found = _matches(model, patterns)
    for name, module in found:
        if isinstance(module, _CONTAINERS):
            raise UsageError(f"strategy.wrap: {name} is a {type(module).__name__}, which has no forward. Say {name}.*")
        if shares(module):
            raise UsageError(
                f"strategy.wrap: {name} shares a parameter with a module outside it, so it can't be gathered alone. "
                "Leave it out, or name a module that holds both"
            )
    return found


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _matches(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Name by name: `blocks.*` is every block, not every module in one."""
    modules = {name: module for name, module in model.named_modules() if name}

    def fits(name: str, pattern: str) -> bool:
        words, parts = name.split("."), pattern.split(".")
        return len(words) == len(parts) and all(map(fnmatch.fnmatchcase, words, parts))

    for pattern in patterns:
        if not any(fits(name, pattern) for name in modules):
            some = ", ".join(list(modules)[:20])
            raise UsageError(f"strategy.wrap: {pattern!r} matches no module. There are: {some}")
    return [(n, m) for n, m in reversed(modules.items()) if any(fits(n, pattern) for pattern in patterns)]


def _items(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: dict[nn.Module, str] = {}  # a module that is used in two places is one unit

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if not isinstance(module, nn.ModuleList | nn.Sequential) or isinstance(child, _CONTAINERS):
                walk(child, f"{prefix}{name}.")
            elif any(True for _ in child.parameters()):
                found.setdefault(child, prefix + name)

    walk(model, "")
    return [(name, module) for module, name in found.items()]
