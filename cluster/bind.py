"""A tree of Nodes -> frozen dataclasses, by their type hints; every problem with its file:line, key and a way out.

A class with a notation of its own brings it along: `SHORT` is the key that a bare text (a number, where the key is
a whole number) stands for (`strategy: ddp` is `{name: ddp}`), `MARK` the key by which it is told from the other
classes of a union, `Special` replaces the mapping of fields. Field metadata: doc, min, max (inclusive) and validate, a
function that raises ValueError with what to do.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from dtrain.cluster.configfile import BROKEN, DEFAULT, Node, describe, from_plain, is_broken, nearest, to_plain
from dtrain.cluster.errors import Problem

T = TypeVar("T")


class Missing:
    """What binding returns where a problem was reported instead of a value."""


MISSING = Missing()


@runtime_checkable
class Special(Protocol):
    """A class whose notation is not the mapping of its fields."""

    @classmethod
    def from_node(cls, node: Node, key: str) -> tuple[Any, list[Problem]]:
        """The instance, or None with at least one problem (or with a broken value, whose problem is known)."""

    def to_plain(self) -> Any:
        """The notation that from_node reads back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSpec:
    """One key: what it may be, what it is when nobody sets it (MISSING: required), and the field's metadata."""

    hint: Any
    default: Any
    metadata: Mapping[str, Any]


Schema = dict[str, FieldSpec]


def schema_of(cls: type) -> Schema:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: FieldSpec(hint=hints[field.name], default=_default(field), metadata=field.metadata)
        for field in dataclasses.fields(cls)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


def bind(cls: type[T], node: Node, key: str = "") -> tuple[T | None, list[Problem]]:
    """An instance of the dataclass `cls`; None where a problem prevents it. `key`: the path of `node`, for messages."""
    problems: list[Problem] = []
    value = _bind_class(cls, node, key, problems)
    return (None if value is MISSING else value), problems


def bind_fields(schema: Schema, node: Node, key: str = "") -> tuple[dict[str, Any], list[Problem]]:
    """The values of a mapping's keys, without those that have a problem."""
    problems: list[Problem] = []
    return _bind_fields(schema, node, key, problems), problems


# ---- one value ----


def _bind_fields(schema: Schema, node: Node, key: str, problems: list[Problem]) -> dict[str, Any]:
    assert isinstance(node.value, dict)
    for name, child in node.value.items():
        if name not in schema:
            message = unknown_key(name, schema, () if key else keys_below(name, schema))
            problems.append(Problem(where=child.where, key=_join(key, name), message=message))
    values: dict[str, Any] = {}
    for name, spec in schema.items():
        if name in node.value:
            value = _bind_value(spec.hint, node.value[name], _join(key, name), spec.metadata, problems)
        elif spec.default is MISSING:
            value = MISSING
            doc = f" ({spec.metadata['doc']})" if "doc" in spec.metadata else ""
            message = f"is required and missing{doc}. Add it: {name}: ..."
            problems.append(Problem(where=node.where, key=_join(key, name), message=message))
        else:
            value = spec.default
        if value is not MISSING:
            values[name] = value
    return values


def unknown_key(name: str, valid: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """The message for a key that does not exist; `elsewhere`: those that end in its name."""
    near = " or ".join(elsewhere[:3]) or nearest(name, valid)
    hint = f"Did you mean {near}? " if near else ""
    return f"unknown key. {hint}Valid here: {', '.join(valid)}."


def keys_below(name: str, schema: Schema) -> list[str]:
    """The paths of the keys called `name` in the schema's sections: cluster.nodes for nodes."""
    found = []
    for section, spec in schema.items():
        arms = [arm for arm in arms_of(spec.hint) if isinstance(arm, type)]
        inner = [schema_of(arm) for arm in arms if dataclasses.is_dataclass(arm)]
        for below in inner:
            paths = [name] if name in below else keys_below(name, below)
            found += [f"{section}.{path}" for path in paths]
    return found


def _bind_value(hint: Any, node: Node, key: str, metadata: Mapping[str, Any], problems: list[Problem]) -> Any:
    if node.value is BROKEN:
        return MISSING
    value = _bind_union(hint, node, key, metadata, problems)
    if value is MISSING or value is None or "validate" not in metadata:
        return value
    try:
        metadata["validate"](value)
    except ValueError as error:
        problems.append(Problem(where=node.where, key=key, message=str(error)))
        return MISSING
    return value


def _bind_union(hint: Any, node: Node, key: str, metadata: Mapping[str, Any], problems: list[Problem]) -> Any:
    arms = arms_of(hint)
    if node.value is None and (type(None) in arms or hint is Any):
        return None
    arms = [arm for arm in arms if arm is not type(None)]
    classes = [arm for arm in arms if dataclasses.is_dataclass(arm)]
    lists = [arm for arm in arms if typing.get_origin(arm) is tuple]
    if classes and lists and isinstance(node.value, list):
        return _bind_one(lists[0], node, key, metadata, problems)
    if classes and (len(classes) + len(lists) == len(arms) or isinstance(node.value, dict)):
        return _bind_class(_choose(classes, node), node, key, problems)
    if len(arms) == 1:
        return _bind_one(arms[0], node, key, metadata, problems)
    for arm in sorted(arms, key=_exactness):
        trial: list[Problem] = []
        value = _bind_one(arm, node, key, metadata, trial)
        if value is not MISSING:
            return value
        if _reads_as(arm, node):  # the right type, so its own words (a range) say more than those of the union
            problems += trial
            return MISSING
    choices = [choice for arm in arms if typing.get_origin(arm) is Literal for choice in typing.get_args(arm)]
    _mismatch(node, key, " or ".join(expected(arm, metadata) for arm in arms), problems, choices)
    return MISSING


def _bind_one(hint: Any, node: Node, key: str, metadata: Mapping[str, Any], problems: list[Problem]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return MISSING if is_broken(node) else to_plain(node)
    if origin is Literal:
        if any(node.value == choice and type(node.value) is type(choice) for choice in arguments):
            return node.value
        return _mismatch(node, key, expected(hint, metadata), problems, arguments)
    if origin is tuple:
        return _bind_list(arguments[0], node, key, metadata, problems)
    if origin is dict:
        return _bind_dict(arguments[1], node, key, metadata, problems)
    value = _scalar(hint, node)
    if value is MISSING:
        return _mismatch(node, key, expected(hint, metadata), problems, ())
    low, high = metadata.get("min"), metadata.get("max")
    in_range = hint is str or ((low is None or value >= low) and (high is None or value <= high))
    return value if in_range else _mismatch(node, key, expected(hint, metadata), problems, ())


def _scalar(hint: Any, node: Node) -> Any:
    value = node.value
    if hint is bool:
        return value if isinstance(value, bool) else MISSING
    if isinstance(value, bool):
        return MISSING
    if hint is int:
        return value if isinstance(value, int) else MISSING
    if hint is float:
        return float(value) if isinstance(value, int | float) else MISSING
    if hint is str and isinstance(value, int | float):  # YAML's guess at types is no concern of a name like 2026
        return node.raw or str(value)
    if hint is str:
        return value if isinstance(value, str) else MISSING
    raise TypeError(f"bind does not know the type {hint}")


def _bind_list(hint: Any, node: Node, key: str, metadata: Mapping[str, Any], problems: list[Problem]) -> Any:
    if not isinstance(node.value, list):
        return _mismatch(node, key, "a list", problems, ())
    items = [_bind_value(hint, item, f"{key}.{i}", metadata, problems) for i, item in enumerate(node.value)]
    return MISSING if any(item is MISSING for item in items) else tuple(items)


def _bind_dict(hint: Any, node: Node, key: str, metadata: Mapping[str, Any], problems: list[Problem]) -> Any:
    if not isinstance(node.value, dict):
        return _mismatch(node, key, "a mapping", problems, ())
    values: dict[str, Any] = {}
    own = {word: value for word, value in metadata.items() if word != "validate"}  # that is asked of the whole mapping
    for name, child in node.value.items():
        written = child
        if hint is str and isinstance(child.value, bool):
            written = replace(child, value=child.raw or str(child.value).lower())
        values[name] = _bind_value(hint, written, _join(key, name), own, problems)
    return MISSING if any(value is MISSING for value in values.values()) else values


def _bind_class(cls: Any, node: Node, key: str, problems: list[Problem]) -> Any:
    node = _expand_one(cls, node)
    if node.value is BROKEN:
        return MISSING
    if not isinstance(node.value, dict):
        short = getattr(cls, "SHORT", "")
        kind = "a number" if _is_number(cls, short) else "text"
        return _mismatch(node, key, f"a mapping, or {kind} for its {short}" if short else "a mapping", problems, ())
    if issubclass(cls, Special):
        value, found = cls.from_node(node, key)
        problems += found
        return MISSING if value is None else value
    schema = schema_of(cls)
    values = _bind_fields(schema, node, key, problems)
    return cls(**values) if len(values) == len(schema) else MISSING


# ---- types in words ----


def arms_of(hint: Any) -> list[Any]:
    """The types of a union; of any other type, itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def expected(hint: Any, metadata: Mapping[str, Any]) -> str:
    """A type in words, its range included."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        choices = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in arguments]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (tuple, dict):
        return "a list" if origin is tuple else "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "any value"}
    low, high = metadata.get("min"), metadata.get("max")
    if hint not in (int, float) or (low is None and high is None):
        return words.get(hint, "a mapping")
    if low is not None and high is not None:
        return f"{words[hint]} between {low:g} and {high:g}"
    return f"{words[hint]} of at least {low:g}" if low is not None else f"{words[hint]} of at most {high:g}"


def _mismatch(node: Node, key: str, wanted: str, problems: list[Problem], choices: Iterable[Any]) -> Missing:
    message = f"expects {wanted}, found {describe(node)}."
    near = nearest(node.value, [str(choice) for choice in choices]) if isinstance(node.value, str) else ""
    hint = f" Did you mean {near}?" if near else ""
    if not hint and isinstance(node.value, str) and "number" in wanted and _looks_numeric(node.value):
        hint = " Write it without quotes."
    elif isinstance(node.value, float) and node.value.is_integer() and "whole number" in wanted:
        hint = f" Write {int(node.value)}."
    elif isinstance(node.value, str) and wanted == "true or false":
        hint = " Write it without quotes." if node.value.lower() in ("true", "false") else ""
    elif wanted == "a list" and not isinstance(node.value, dict):
        hint = " Put it in square brackets."
    problems.append(Problem(where=node.where, key=key, message=message + hint))
    return MISSING


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _exactness(hint: Any) -> int:
    order = {bool: 0, int: 1, float: 2, str: 4}
    return order.get(hint, 3)


def _reads_as(hint: Any, node: Node) -> bool:
    return hint in (int, float) and isinstance(node.value, int) and not isinstance(node.value, bool)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


# ---- short forms and defaults ----


def _choose(classes: list[Any], node: Node) -> Any:
    """The class of a union that the notation means: the one whose MARK is there, or a dotted name in its place."""
    for cls in classes:
        mark = getattr(cls, "MARK", "")
        if mark and (mark in node.value if isinstance(node.value, dict) else "." in str(node.value)):
            return cls
    return next((cls for cls in classes if not getattr(cls, "MARK", "")), classes[0])


def _expand_one(cls: Any, node: Node) -> Node:
    short, value = getattr(cls, "SHORT", ""), node.value
    text = isinstance(value, str) and not value.startswith("${")
    number = isinstance(value, int | float) and not isinstance(value, bool) and _is_number(cls, short)
    return Node({short: node}, node.where, replaces=True) if short and (text or number) else node


def _is_number(cls: Any, key: str) -> bool:
    return not issubclass(cls, Special) and key in schema_of(cls) and schema_of(cls)[key].hint is int


def expand_short_forms(schema: Schema, node: Node) -> Node:
    """The tree with `strategy: ddp` written out as `strategy: {name: ddp}`, wherever the schema has such forms."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    for name, spec in schema.items():
        classes = [arm for arm in arms_of(spec.hint) if dataclasses.is_dataclass(arm)]
        if name not in children or not classes:
            continue
        cls: Any = _choose(classes, children[name])
        child = _expand_one(cls, children[name])
        children[name] = child if issubclass(cls, Special) else expand_short_forms(schema_of(cls), child)
    return replace(node, value=children)


def fill_defaults(schema: Schema, node: Node) -> Node:
    """The tree with every default written out, so that references can mean them. Required keys stay missing."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    for name, spec in schema.items():
        if name not in children:
            if spec.default is not MISSING:
                children[name] = from_plain(plain(spec.default), DEFAULT)
            continue
        classes = [arm for arm in arms_of(spec.hint) if dataclasses.is_dataclass(arm)]
        if not classes:
            continue
        cls: Any = _choose(classes, children[name])
        if not issubclass(cls, Special):
            children[name] = fill_defaults(schema_of(cls), children[name])
    return replace(node, value=children)


def plain(value: Any) -> Any:
    """Bound values back to what YAML can hold; binding that gives an equal value."""
    if isinstance(value, Special):
        return value.to_plain()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
