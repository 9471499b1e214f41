"""`${key.path}`, `${env:NAME}` and a leading `~/` in the text values of a config tree. The environment is passed in.

`$${` stands for a literal `${`. A value that is one reference takes the value referred to, whatever its type; inside a
longer text the value is written out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from dtrain.cluster.configfile import BROKEN, Node, describe, nearest, plain_scalar, walk
from dtrain.cluster.errors import Problem

Path = tuple[str, ...]
_REFERENCE = re.compile(r"\$\$\{|\$\{([^${}]*)\}|\$\{")
_WHOLE = re.compile(r"\$\{([^${}]*)\}")
_ENV = "env:"


def resolve_references(
    tree: Node, environ: Mapping[str, str], transforms: Mapping[str, Callable[[str], str]]
) -> tuple[Node, list[Problem]]:
    """The tree without references. `transforms` change the text of some keys before others refer to it."""
    resolver = _Resolver(tree, environ, transforms)
    return resolver.resolve((), tree), resolver.problems


class _Resolver:
    def __init__(self, tree: Node, environ: Mapping[str, str], transforms: Mapping[str, Callable[[str], str]]) -> None:
        self.tree = tree
        self.environ = environ
        self.transforms = transforms
        self.problems: list[Problem] = []
        self.done: dict[Path, Node] = {}
        self.final: dict[int, Node] = {}  # by id: nodes that need no second look, so that a literal ${ stays one
        self.active: list[Path] = []

    def resolve(self, path: Path, node: Node) -> Node:
        if path in self.done:
            return self.done[path]
        if id(node) in self.final:
            return node
        if path in self.active:
            return self.cycle(path, node)
        self.active.append(path)
        try:
            resolved = self.resolve_inside(path, node)
        finally:
            self.active.pop()
        self.done[path] = resolved
        self.final[id(resolved)] = resolved
        return resolved

    def resolve_inside(self, path: Path, node: Node) -> Node:
        if isinstance(node.value, dict):
            children = {key: self.resolve((*path, key), child) for key, child in node.value.items()}
            return replace(node, value=children)
        if isinstance(node.value, list):
            return replace(node, value=[self.resolve((*path, str(i)), item) for i, item in enumerate(node.value)])
        if not isinstance(node.value, str):
            return node
        resolved = self.text(path, node, node.value) if "${" in node.value else node
        if isinstance(resolved.value, str):
            expanded = os.path.expanduser(resolved.value) if resolved.value.startswith("~/") else resolved.value
            resolved = replace(resolved, value=self.transforms.get(".".join(path), str)(expanded))
        return resolved

    def text(self, path: Path, node: Node, text: str) -> Node:
        whole = _WHOLE.fullmatch(text)
        if whole:
            found = self.value_of(whole[1], path, node)
            return Node(BROKEN, node.where) if found is None else replace(found, where=node.where)
        pieces: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(text):
            piece = "${" if match[0] == "$${" else self.piece(match, path, node)
            if piece is None:
                return Node(BROKEN, node.where)
            pieces += [text[end : match.start()], piece]
            end = match.end()
        return replace(node, value="".join(pieces) + text[end:])

    def piece(self, match: re.Match[str], path: Path, node: Node) -> str | None:
        if match[1] is None:
            self.report(path, node, "${ has no closing }. Write $${ for a literal ${.")
            return None
        found = self.value_of(match[1], path, node)
        if found is None:
            return None
        if isinstance(found.value, dict | list) or found.value is None:
            self.report(path, node, f"${{{match[1]}}} is {describe(found)}, which cannot stand inside a text.")
            return None
        return found.value if isinstance(found.value, str) else found.raw or str(found.value)

    def value_of(self, name: str, path: Path, node: Node) -> Node | None:
        """The node that `name` refers to; None where that is reported as a problem (here or elsewhere)."""
        name = name.strip()
        if name.startswith(_ENV):
            variable = name.removeprefix(_ENV)
            if variable in self.environ:
                return plain_scalar(self.environ[variable], node.where)
            self.report(path, node, f"${{{name}}}: the environment variable {variable} is not set. Export it first.")
            return None
        found = self.lookup(tuple(name.split(".")))
        if found is None:
            known = [".".join(known_path) for known_path, _ in walk(self.tree) if known_path]
            near = nearest(name, known)
            hint = f"Did you mean ${{{near}}}?" if near else "References are full key paths, like ${train.steps}."
            self.report(path, node, f"${{{name}}} refers to a key that does not exist. {hint}")
            return None
        return None if found.value is BROKEN else found

    def lookup(self, path: Path) -> Node | None:
        node = self.tree
        for depth, part in enumerate(path):
            if isinstance(node.value, str) and "${" in node.value:
                node = self.resolve(path[:depth], node)
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[part]
            elif isinstance(node.value, list) and part.isdigit() and int(part) < len(node.value):
                node = node.value[int(part)]
            else:
                return node if node.value is BROKEN else None
        return self.resolve(path, node)

    def cycle(self, path: Path, node: Node) -> Node:
        start = self.active.index(path)
        names = [".".join(step) for step in [*self.active[start:], path]]
        # Containers are active while their children are resolved: they are no step of the circle that a person wrote.
        steps = [n for i, n in enumerate(names) if not any(o.startswith(n + ".") for o in names[i + 1 :]) or i == 0]
        self.report(path, node, f"the references go in a circle: {' -> '.join(steps)}. Write one of them out.")
        return Node(BROKEN, node.where)

    def report(self, path: Path, node: Node, message: str) -> None:
        self.problems.append(Problem(where=node.where, key=".".join(path), message=message))
