"""Which stored tensor fills which of a model's: renaming, ties, and what is missing, left over or starts fresh. Pure
and torch-free.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dtrain.cluster.configfile import nearest
from dtrain.cluster.errors import UsageError
from dtrain.runtime.modelconfig import InitConfig
from dtrain.runtime.weightfiles import StoredTensor

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))  # rounded from one to the other; all else must be equal
_MOST_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A parameter or persistent buffer of the model. A tied one has several names, its canonical one first."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Canonical names, in the model's order, but for `unexpected`: names there that no tensor here has."""

    sources: Mapping[str, StoredTensor]
    fresh: tuple[str, ...]  # keep their initial values; not stored
    replaced: tuple[str, ...]  # keep their initial values, though something is stored under their name
    unexpected: tuple[str, ...]


def match_weights(
    wanted: Sequence[Wanted],
    stored: Mapping[str, StoredTensor],
    config: InitConfig,
    translate: Callable[[Iterable[str]], Mapping[str, str]],
) -> Match:
    """`translate`: what the model's library makes of the names that config.map gives.

    Raises UsageError naming every tensor of the model that nothing fills or that does not fit, with what to do."""
    named = rename(stored, config.map)
    named = _renamed(named, translate(named))
    here = {name for tensor in wanted for name in tensor.names}
    _check_patterns(config.fresh, here)
    sources: dict[str, StoredTensor] = {}
    fresh: list[str] = []
    replaced: list[str] = []
    missing: list[Wanted] = []
    problems: list[str] = []
    for tensor in wanted:
        found = next((name for name in tensor.names if name in named), None)
        if any(fnmatch.fnmatchcase(name, pattern) for name in tensor.names for pattern in config.fresh):
            (fresh if found is None else replaced).append(tensor.names[0])
        elif found is None:
            missing.append(tensor)
        elif fault := _unfit(tensor, named[found]):
            problems.append(f"{tensor.names[0]}: {fault}")
        else:
            sources[tensor.names[0]] = named[found]
    left = [name for name in named if name not in here]
    problems += _missing_words(missing, left, named)
    if problems:
        raise UsageError("model.init_from: the weights do not fit this model:\n  " + "\n  ".join(problems))
    return Match(sources=sources, fresh=tuple(fresh), replaced=tuple(replaced), unexpected=tuple(left))


def rename(stored: Mapping[str, StoredTensor], renames: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Every name through every substitution, in order. Raises UsageError where two become one."""
    becomes: dict[str, str] = {}
    for name in stored:
        new = name
        for pattern, replacement in renames.items():
            try:
                new = re.sub(pattern, replacement, new)
            except (re.error, IndexError) as error:
                raise UsageError(f"model.init_from.map: {pattern!r}: {replacement!r}: {error}") from None
        becomes[name] = new
    return _renamed(stored, becomes)


def _renamed(stored: Mapping[str, StoredTensor], becomes: Mapping[str, str]) -> dict[str, StoredTensor]:
    olds: dict[str, str] = {}
    for old, new in becomes.items():
        if new in olds:
            raise UsageError(f"model.init_from.map: {olds[new]} and {old} both become {new}")
        olds[new] = old
    return {new: stored[old] for new, old in olds.items()}


def _check_patterns(patterns: Iterable[str], names: set[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            hint = f"Did you mean {near}?" if near else f"There are: {', '.join(sorted(names)[:12])}"
            raise UsageError(f"model.init_from.fresh: {pattern!r} matches no parameter. {hint}")


def _unfit(tensor: Wanted, stored: StoredTensor) -> str:
    if stored.shape != tensor.shape:
        return (
            f"{list(stored.shape)} there, {list(tensor.shape)} here. To start it from its initial values, add it to "
            "model.init_from.fresh"
        )
    if stored.dtype != tensor.dtype and not {stored.dtype, tensor.dtype} <= _FLOATS:
        return f"{stored.dtype} there, {tensor.dtype} here: such numbers do not convert (quantized weights?)"
    return ""


def _missing_words(missing: Sequence[Wanted], left: Sequence[str], named: Mapping[str, StoredTensor]) -> Iterator[str]:
    for tensor in missing[:_MOST_SHOWN]:
        near = nearest(tensor.names[0], left) or nearest(tensor.names[0], named)
        yield f"{tensor.names[0]}: not there" + (f"; the nearest is {near}" if near else "")
    if len(missing) > _MOST_SHOWN:
        yield f"and {len(missing) - _MOST_SHOWN} more that are not there"
    if missing:
        yield _way_out([tensor.names[0] for tensor in missing], left)


def _way_out(missing: Sequence[str], left: Sequence[str]) -> str:
    """A map, where one prefix explains most of it, and the key for what is really missing."""
    fresh = "What is to start from its initial values, add to model.init_from.fresh"
    for prefix, dropped in _prefixes(missing, left):
        there = set(left)
        found = [name for name in missing if (prefix + name if dropped else _without(prefix, name)) in there]
        if 2 * len(found) < len(missing):
            continue
        if dropped:
            rule = f"'^{re.escape(prefix)}': ''"
        else:
            heads = "|".join(sorted({re.escape(_without(prefix, name).split(".")[0]) for name in found}))
            rule = f"'^({heads})\\b': '{prefix}\\1'"
        which = "All" if len(found) == len(missing) else f"{len(found)} of them"
        rest = "" if len(found) == len(missing) else f". {fresh}"
        return f"{which} are there {'with' if dropped else 'without'} {prefix!r} before them. Set map: {{{rule}}}{rest}"
    return f"Where names differ, set model.init_from.map. {fresh}"


def _prefixes(missing: Sequence[str], left: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Prefixes by which a name there and one here differ; true: the one there has it."""
    for here in missing[:_MOST_SHOWN]:
        yield from ((name.removesuffix(here), True) for name in left if name.endswith(f".{here}"))
        yield from ((here.removesuffix(name), False) for name in left if here.endswith(f".{name}"))


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else ""
