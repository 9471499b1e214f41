"""The files that one config is made of, weakest first: site files, what each file extends, the file itself.

Reads and checks what may stand in which file; merging them is cluster/layers.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dtrain.cluster.configfile import BROKEN, Node, describe, read_file
from dtrain.cluster.errors import Problem

EXTENDS = "extends"
SYSTEM_SITE = "/etc/dtrain/site.yaml"
# What a site may say about every run on it: where things are, never what is trained.
SITE_KEYS: Mapping[str, tuple[str, ...]] = {"cluster": (), "run_dir": (), "checkpoint": ("url",), "track": ()}
_MAX_DEPTH = 20  # of files that extend each other


@dataclass(slots=True)
class Sources:
    """`layers`: one tree a file, weakest first; the last one is the config's own. `complete`: every file could be read,
    so that what is missing in them is really missing."""

    layers: list[Node] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # as named in messages, in the order of `layers`
    complete: bool = True
    extended: list[str] = field(default_factory=list)  # of `files`, those that the config extends, at any depth


def read_sources(path: str | os.PathLike[str], environ: Mapping[str, str]) -> Sources:
    """Every layer that is a file."""
    sources = Sources()
    for site in site_files(environ):
        _read_site(site, sources)
    _read_chain(os.fspath(path), (), sources)
    return sources


def site_files(environ: Mapping[str, str]) -> list[str]:
    """The system's and the account's, those that exist. DTRAIN_SITE names another one for the system's; empty: none."""
    asked = environ.get("DTRAIN_SITE")
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    own = os.path.join(home, "dtrain", "site.yaml")
    found = [file for file in (SYSTEM_SITE if asked is None else "", own) if file and os.path.lexists(file)]
    return [asked, *found] if asked else found


def _read_site(file: str, sources: Sources) -> None:
    node, problems = read_file(file, may_be_empty=True)
    sources.problems += problems
    if node is None or not isinstance(node.value, dict):
        sources.complete = False
        return
    foreign = dict(_foreign(node))
    for key, place in foreign.items():
        message = "a site file sets only cluster, run_dir, checkpoint.url and track. Move it to the run's own config."
        sources.problems.append(Problem(where=place, key=key, message=message))
    sources.layers.append(_without(node, foreign))
    sources.files.append(file)


def _foreign(node: Node) -> Iterator[tuple[str, str]]:
    """The keys that do not belong into a site file, and where they are."""
    assert isinstance(node.value, dict)
    for key, child in node.value.items():
        if key not in SITE_KEYS:
            yield key, child.where
        elif SITE_KEYS[key] and isinstance(child.value, dict):
            yield from (
                (f"{key}.{name}", inner.where) for name, inner in child.value.items() if name not in SITE_KEYS[key]
            )


def _without(node: Node, keys: Mapping[str, str], path: str = "") -> Node:
    """So that a problem of a site file is reported once, and not again as one of the merged config."""
    if not isinstance(node.value, dict):
        return node
    kept = {
        name: _without(child, keys, f"{path}{name}.") for name, child in node.value.items() if path + name not in keys
    }
    return replace(node, value=kept)


def _read_chain(file: str, above: tuple[str, ...], sources: Sources) -> None:
    """What `file` extends, and then the file. `above`: the files that lead here."""
    node, problems = read_file(file, may_be_empty=bool(above))
    sources.problems += problems
    if node is None:
        sources.complete = False
        return
    bases: Sequence[tuple[str, str]] = ()
    if isinstance(node.value, dict) and EXTENDS in node.value:
        bases = _bases(node.value[EXTENDS], file, sources.problems)
        node = replace(node, value={key: child for key, child in node.value.items() if key != EXTENDS})
    chain = (*above, file)
    for base, place in bases:
        _read_base(base, place, chain, sources)
    sources.layers.append(node)
    sources.files.append(file)
    if above:
        sources.extended.append(file)


def _read_base(base: str, place: str, chain: tuple[str, ...], sources: Sources) -> None:
    real = [os.path.realpath(file) for file in chain]
    if os.path.realpath(base) in real:
        circle = " -> ".join([*chain[real.index(os.path.realpath(base)) :], base])
        message = f"the files extend each other in a circle: {circle}. Take one of them out."
    elif len(chain) >= _MAX_DEPTH:
        message = f"more than {_MAX_DEPTH} files extend each other. Put some of them together."
    elif not os.path.isfile(base):
        message = f"{base}: no such file. The path starts at the folder of the file that says it."
    else:
        _read_chain(base, chain, sources)
        return
    sources.complete = False
    sources.problems.append(Problem(where=place, key=EXTENDS, message=message))


def _bases(node: Node, file: str, problems: list[Problem]) -> list[tuple[str, str]]:
    """(path, place) of each file named; relative ones start at the folder of `file`."""
    items = node.value if isinstance(node.value, list) else [node]
    found = []
    for item in items:
        if item.value is BROKEN:
            continue
        if not isinstance(item.value, str) or not item.value:
            message = f"expects the path of a config file, or a list of them, found {describe(item)}."
        elif "${" in item.value:
            message = "references (${...}) are resolved after all files are read, so none can stand here. Write it out."
        else:
            path = os.path.join(os.path.dirname(file), os.path.expanduser(item.value))
            found.append((os.path.normpath(path), item.where))
            continue
        problems.append(Problem(where=item.where, key=EXTENDS, message=message))
    return found


def misplaced_extends(words: Node) -> tuple[Node, list[Problem]]:
    """The words of the command line without an `extends`, which only a file can say."""
    if not isinstance(words.value, dict) or EXTENDS not in words.value:
        return words, []
    place = words.value[EXTENDS].where
    message = "belongs into a config file: it is read before the command line is. Write it there."
    rest = {key: child for key, child in words.value.items() if key != EXTENDS}
    return replace(words, value=rest), [Problem(where=place, key=EXTENDS, message=message)]
