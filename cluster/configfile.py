"""YAML text -> a tree of Nodes that remember their file:line, and back to text. Collects Problems, not the first only.

Merging trees is cluster/layers.py's, `${...}` is cluster/references.py's, types are cluster/bind.py's. The notation is
YAML with the scalars of YAML 1.2 (so that 1e-4 is a number, and 12:30 and 2026-01-01 are text).
"""

from __future__ import annotations

import difflib
import enum
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dtrain.cluster.errors import Problem

Scalar = str | int | float | bool | None
DEFAULT = "default"  # the origin of a value that nobody set
_MAX_VALUES = 100_000  # aliases can make a short file expand without end


class Broken(enum.Enum):
    """Stands where a value could not be read; the problem is already reported, so nobody reports it again."""

    BROKEN = "broken"


BROKEN = Broken.BROKEN


@dataclass(frozen=True, slots=True)
class Node:
    """A value and the place of its key: "cfg.yaml:12", "command line" or "default"."""

    value: Scalar | dict[str, Node] | list[Node] | Broken
    where: str
    raw: str = ""  # a plain scalar as it was written
    replaces: bool = False  # a mapping that stands for a scalar: merging replaces with it


# ---- notation ----

_PREFIX = "tag:yaml.org,2002:"
_RULES = (  # tag, pattern, possible first characters
    (_PREFIX + "bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("!ambiguous", r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "yYnNoO"),
    (_PREFIX + "int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+", "-+0123456789"),
    (
        _PREFIX + "float",
        r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_PREFIX + "null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_PREFIX + "merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own shape of the table


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):  # the dumper must quote what the loader would not read as text
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with line breaks in double quotes: PyYAML's other styles fold the rarer ones (U+0085, U+2028) to spaces."""
    style = '"' if text.splitlines() != [text] else None
    return dumper.represent_scalar(_PREFIX + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """Text that read_text reads back equal; keys keep their order. `flow`: on one line, without the line's end."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=10**9 if flow else 110,
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


# ---- reading ----


def read_file(path: str | os.PathLike[str], *, may_be_empty: bool = False) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML file that holds a mapping; None where nothing could be read. `path` is named as given."""
    origin = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = f"Did you mean {near}?" if (near := _near_file(Path(path))) else "Check the path."
        return None, [Problem(where=origin, key="", message=f"no such file. {hint}")]
    except UnicodeDecodeError as error:
        return None, [Problem(where=origin, key="", message=f"not UTF-8 text (byte {error.start}). Save it as UTF-8.")]
    except OSError as error:
        return None, [Problem(where=origin, key="", message=f"cannot be read: {error.strerror}.")]
    node, problems = read_text(text, origin)
    if node is None or isinstance(node.value, dict | Broken):
        return (replace(node, where=origin) if node else None), problems
    if node.value is None and may_be_empty:
        return Node({}, origin), problems
    if node.value is None:
        found = "the file is empty. A config needs at least model, data, optimizer and train."
    else:
        found = f"expects a mapping at the top level (`key: value` lines), found {describe(node)}."
    return None, [*problems, Problem(where=node.where, key="", message=found)]


def read_text(text: str, origin: str, *, lines: bool = True) -> tuple[Node | None, list[Problem]]:
    """The tree of any YAML text. `lines`: places are "origin:line", else just `origin`."""
    builder = _Builder(origin, lines)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = builder.place(mark.line) if mark else origin
        return None, [Problem(where=where, key="", message=_syntax_message(error, text))]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        character = f"the control character U+{ord(error.character):04X}" if error.character else "a bad byte"
        return None, [Problem(where=builder.place(line), key="", message=f"{character} is not allowed in YAML.")]
    except RecursionError:
        return None, [Problem(where=origin, key="", message="is nested too deeply to be read.")]
    if root is None:
        return Node(None, builder.place(0)), []
    node = builder.build(root, builder.place(root.start_mark.line), ())
    return node, builder.problems


class _Builder:
    """Turns PyYAML's graph of nodes into a tree of ours, once."""

    def __init__(self, origin: str, lines: bool) -> None:
        self.origin = origin
        self.lines = lines
        self.problems: list[Problem] = []
        self.num_values = 0
        self.open_ids: set[int] = set()

    def place(self, line: int) -> str:
        return f"{self.origin}:{line + 1}" if self.lines else self.origin

    def broken(self, where: str, path: tuple[str, ...], message: str) -> Node:
        self.problems.append(Problem(where=where, key=".".join(path), message=message))
        return Node(BROKEN, where)

    def build(self, node: yaml.Node, where: str, path: tuple[str, ...]) -> Node:
        self.num_values += 1
        if self.num_values == _MAX_VALUES:
            return self.broken(where, path, f"expands to more than {_MAX_VALUES} values. Use fewer aliases (*).")
        if self.num_values > _MAX_VALUES:
            return Node(BROKEN, where)
        if id(node) in self.open_ids:
            return self.broken(where, path, "the alias (*) contains itself.")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, where, path)
        self.open_ids.add(id(node))
        try:
            if node.tag not in (_PREFIX + "map", _PREFIX + "seq"):
                return self.broken(where, path, f"the tag {node.tag} is not supported. Leave it out.")
            if isinstance(node, yaml.MappingNode):
                return Node(self.mapping(node, path), where)
            items = enumerate(node.value)
            return Node(
                [self.build(item, self.place(item.start_mark.line), (*path, str(i))) for i, item in items], where
            )
        finally:
            self.open_ids.discard(id(node))

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self.place(key_node.start_mark.line)
            if key_node.tag == _PREFIX + "merge":
                for key, value in self.merge_key(value_node, where, path).items():
                    merged.setdefault(key, value)
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_PREFIX + "str", "!ambiguous"):
                shown = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.broken(where, path, f"keys are text, found {shown}. Write it in quotes.")
                continue
            key = str(key_node.value)
            value = self.build(value_node, where, (*path, key))
            if key in own:
                first = own[key].where
                self.broken(where, (*path, key), f"is given twice, first at {first}. Keep one of them.")
            else:
                own[key] = value
        return {**{key: value for key, value in merged.items() if key not in own}, **own}

    def merge_key(self, node: yaml.Node, where: str, path: tuple[str, ...]) -> dict[str, Node]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Node] = {}
        for source in sources:
            value = self.build(source, where, path).value
            if not isinstance(value, dict):
                self.broken(where, (*path, "<<"), "merges mappings only.")
                continue
            for key, child in value.items():
                merged.setdefault(key, child)
        return merged

    def scalar(self, node: yaml.ScalarNode, where: str, path: tuple[str, ...]) -> Node:
        text = str(node.value)
        kind = node.tag.removeprefix(_PREFIX)
        if kind in ("str", "merge"):
            return Node(text, where)
        if kind == "!ambiguous":
            return self.broken(
                where, path, f'{text} is text to some and a truth value to others. Write true, false or "{text}".'
            )
        if kind not in ("null", "bool", "int", "float"):
            return self.broken(where, path, f"the tag {node.tag} is not supported. Leave it out.")
        try:
            return Node(parse_scalar(kind, text), where, raw=text)
        except ValueError:
            return self.broken(where, path, f"{text} cannot be read as {kind}.")


def parse_scalar(kind: str, text: str) -> Scalar:
    """The value of a plain scalar of YAML's kind null, bool, int or float. Raises ValueError."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    if kind == "int":
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)
    value = float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text if math.isinf(value) and "inf" not in digits.lower() else value  # 12e4567 is a commit, not a number


def plain_scalar(text: str, where: str) -> Node:
    """What an unquoted `text` means, for values that come from an environment variable."""
    for tag, pattern, _ in _RULES:
        kind = tag.removeprefix(_PREFIX)
        if kind in ("bool", "int", "float") and re.fullmatch(pattern, text):
            return Node(parse_scalar(kind, text), where, raw=text)
    return Node(text, where)


def _syntax_message(error: yaml.MarkedYAMLError, text: str) -> str:
    problem = error.problem or "cannot be understood"
    mark = error.problem_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "'\\t'" in problem or (line and "\t" in line[: len(line) - len(line.lstrip())]):
        return "not valid YAML: a tab. YAML is indented with spaces."
    context = f" {error.context}" if error.context else ""
    start = f" (begun at line {error.context_mark.line + 1})" if error.context_mark else ""
    return f"not valid YAML:{context}{start}, {problem}." if context else f"not valid YAML: {problem}."


def _near_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    near = nearest(path.name, names)
    return str(path.parent / near) if near else ""


# ---- trees ----


def from_plain(value: Any, where: str) -> Node:
    """A tree of plain Python values, all from one place."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(child, where) for key, child in value.items()}, where)
    if isinstance(value, list | tuple):
        return Node([from_plain(child, where) for child in value], where)
    return Node(value, where, raw="" if value is None or isinstance(value, str) else str(value))


def to_plain(node: Node) -> Any:
    """The plain Python values of a tree. What is broken becomes None."""
    if isinstance(node.value, dict):
        return {key: to_plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_plain(child) for child in node.value]
    return None if isinstance(node.value, Broken) else node.value


def is_broken(node: Node) -> bool:
    """Whether any value of the tree could not be read."""
    return any(child.value is BROKEN for _, child in walk(node))


def walk(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every node of the tree with its path, parents first."""
    yield path, node
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from walk(child, (*path, key))
    elif isinstance(node.value, list):
        for i, child in enumerate(node.value):
            yield from walk(child, (*path, str(i)))


def describe(node: Node) -> str:
    """What was found, in words: `the text "abc"`, `the number 1.5`, `a list`."""
    value = node.value
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {node.raw or value}"
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return f'the text "{shown}"'
    return "a list" if isinstance(value, list) else "a mapping"


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """The candidate that `word` most likely means; "" where none is near (difflib's ratio below `cutoff`)."""
    names = list(dict.fromkeys(candidates))
    folded = {name.lower().replace("-", "_"): name for name in reversed(names)}
    wanted = word.lower().replace("-", "_")
    near = difflib.get_close_matches(wanted, folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else ""
