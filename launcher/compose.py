"""A config file, `key=value` words and options -> a LaunchConfig, or a ConfigError with every problem at once.

The sections belong to their folders; here they are put together, checked against each other, and compared.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.cluster.bind import FieldSpec, Schema, bind_fields, expand_short_forms, fill_defaults, plain, schema_of
from dtrain.cluster.configfile import DEFAULT, Node, dump_yaml
from dtrain.cluster.devices import count_gpus, usable_cores
from dtrain.cluster.errors import ConfigError, Problem
from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.layers import layer_of, merge_layers, parse_overrides
from dtrain.cluster.references import resolve_references
from dtrain.launcher.autobackend import Choice, resolve
from dtrain.launcher.checks import check_sections
from dtrain.launcher.nodechecks import find_leaks
from dtrain.launcher.sources import misplaced_extends, read_sources
from dtrain.runtime.config import CheckpointConfig, RunConfig, check_name
from dtrain.runtime.scriptconfig import SCRIPT_KEY, ScriptCheckpointConfig, ScriptRunConfig
from dtrain.strategies.config import StrategyConfig

# Another model, data, optimizer, loss, seed or batch is another training; everything else may change on the way.
_IDENTITY = (
    "model", "optimizer", "loss", "loss_closure", "count", "train.seed", SCRIPT_KEY,
    "data.train", "data.collate", "data.forward", "data.shuffle", "data.streams", "data.batch_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """All that a launch needs to know, checked. `resolved` is the same as plain values, every default included."""

    path: str  # of the config file, absolute
    name: str
    run_dir: str  # absolute, or a URL
    content: RunConfig | ScriptRunConfig
    strategy: StrategyConfig  # of no meaning for a script
    cluster: ClusterConfig
    resolved: dict[str, Any]
    origins: dict[str, str]  # key path -> "file:line", "command line", "--nodes" or "default"
    overrides: tuple[str, ...] = ()  # the words that came with the file, --nodes and --backend among them
    folders: tuple[str, ...] = ()  # absolute: the config's own, then those of the files that it extends
    chosen: str = ""  # which engine cluster.backend: auto has found, and why

    @property
    def run(self) -> RunConfig:
        """`content` of a config with a model. Raises TypeError for a script's."""
        if isinstance(self.content, RunConfig):
            return self.content
        raise TypeError(f"{self.path} runs a script: it has no model, data or optimizer")

    @property
    def steps(self) -> int | None:
        """train.steps; how long a script trains is its own affair."""
        return self.content.train.steps if isinstance(self.content, RunConfig) else None


def launch_schema(default_name: str | None = None) -> Schema:
    """Every top-level key. `default_name`: the name of a run whose config gives none."""
    run = schema_of(RunConfig)
    name = replace(run["name"], default=default_name) if default_name is not None else run["name"]
    doc = "a directory that the submitting host and all nodes share, made when missing; or the URL of a bucket"
    return {
        "name": name,
        "run_dir": FieldSpec(hint=str, default="runs/${name}", metadata={"doc": doc}),
        **{key: spec for key, spec in run.items() if key != "name"},
        "strategy": FieldSpec(
            hint=StrategyConfig, default=StrategyConfig(), metadata={"doc": "how the model is spread over the ranks"}
        ),
        "cluster": FieldSpec(
            hint=ClusterConfig, default=ClusterConfig(), metadata={"doc": "which engine starts the processes"}
        ),
    }


def script_schema(default_name: str | None = None) -> Schema:
    """Every top-level key of a config with `script`."""
    shared, own = launch_schema(default_name), schema_of(ScriptRunConfig)
    return {
        "name": shared["name"],
        SCRIPT_KEY: own[SCRIPT_KEY],
        "run_dir": shared["run_dir"],
        **{key: spec for key, spec in own.items() if key not in ("name", SCRIPT_KEY)},
        "cluster": shared["cluster"],
    }


def _of_one_kind(tree: Node, default_name: str) -> tuple[Schema, Node, list[Problem]]:
    """The schema that the keys ask for: of a script, or of a model and what belongs to it. Keys of the other kind are
    problems, and are left out."""
    assert isinstance(tree.value, dict)
    of_model = launch_schema(default_name)
    if SCRIPT_KEY not in tree.value:
        return of_model, tree, []
    schema, problems = script_schema(default_name), []
    children = dict(tree.value)
    for key in [key for key in children if key in of_model and key not in schema]:
        message = "does not go with script, which brings its own. Remove it, or remove script."
        problems.append(Problem(where=children.pop(key).where, key=key, message=message))
    checkpoint = children.get("checkpoint")
    if checkpoint is not None and isinstance(checkpoint.value, dict):
        of_scripts = schema_of(ScriptCheckpointConfig)
        foreign = [key for key in schema_of(CheckpointConfig) if key in checkpoint.value and key not in of_scripts]
        for key in foreign:
            message = "does not go with script: it saves when it calls checkpoint.save (docs/scripts.md). Remove it."
            problems.append(Problem(where=checkpoint.value[key].where, key=f"checkpoint.{key}", message=message))
        kept = {key: child for key, child in checkpoint.value.items() if key not in foreign}
        children["checkpoint"] = replace(checkpoint, value=kept)
    return schema, replace(tree, value=children), problems


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    backend: str | None = None,
    name: str | None = None,
    run_dir: str | None = None,
) -> LaunchConfig:
    """Raises ConfigError. Options win over `overrides`, which win over the file, then what it extends, then the site's
    files (launcher/sources.py); relative paths start at the working directory."""
    default_name = label_of(Path(path).stem)
    short_forms = launch_schema(default_name)  # a script's keys have none of their own

    def expand(node: Node) -> Node:
        return expand_short_forms(short_forms, node)

    sources = read_sources(path, os.environ)
    words, word_problems = parse_overrides(overrides, expand)
    words, extends_problems = misplaced_extends(words)
    problems = [*sources.problems, *word_problems, *extends_problems]
    if not sources.complete:
        raise ConfigError(problems)
    layers = [*sources.layers, words, *_option_layers(nodes=nodes, backend=backend, name=name, run_dir=run_dir)]
    merged, merge_problems = merge_layers(layers, expand)
    merged = replace(merged, where=os.fspath(path))  # what is missing is missing in the config, not in a site's file
    schema, merged, kind_problems = _of_one_kind(merged, default_name)
    tree, reference_problems = resolve_references(fill_defaults(schema, merged), os.environ, _ABSOLUTE)
    values, bind_problems = bind_fields(schema, tree)
    choice = _choose_backend(values)
    cross_problems = check_sections(
        {"strategy": StrategyConfig(), **values},
        lambda key: _place(tree, key, os.fspath(path)),
        gpus=count_gpus(),
        cores=usable_cores(),
    )
    leaks = find_leaks(tree, values["cluster"].secrets, os.environ) if "cluster" in values else []
    problems += [*merge_problems, *kind_problems, *reference_problems, *bind_problems, *cross_problems, *leaks]
    if problems:
        raise ConfigError(_in_order(problems, os.fspath(path), sources.files))
    options = {"cluster.nodes": nodes, "cluster.backend": backend}
    typed = (*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None))
    files = [os.path.abspath(file) for file in (path, *reversed(sources.extended))]
    config = _build(files[0], tree, values, typed, tuple(dict.fromkeys(map(os.path.dirname, files))))
    return replace(config, chosen=f"{choice.backend}: {choice.why}") if choice else config


def _choose_backend(values: dict[str, Any]) -> Choice | None:
    """Puts the engine in the place of `auto`: nothing after it has to know that word. Raises UsageError."""
    cluster: ClusterConfig | None = values.get("cluster")
    if cluster is None or cluster.backend != "auto":
        return None
    choice = resolve(cluster)
    values["cluster"] = replace(cluster, backend=choice.backend)
    return choice


def label_of(stem: str) -> str:
    """The name of a run whose config gives none: the file's stem where that is a name, else as much of it as can be."""
    try:
        check_name(stem)
    except ValueError:
        letters = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
        return re.sub(r"[^A-Za-z0-9._]+", "-", letters).strip("-._")[:100] or "run"
    return stem


def _option_layers(**options: str | int | None) -> list[Node]:
    keys = {"nodes": "cluster.nodes", "backend": "cluster.backend", "name": "name", "run_dir": "run_dir"}
    return [
        layer_of({keys[option]: value}, f"--{option.replace('_', '-')}")
        for option, value in options.items()
        if value is not None
    ]


def _absolute_url(url: str) -> str:
    return url if "://" in url or not url else os.path.abspath(url)


# What a relative path starts at must not depend on where a node's processes are started.
_ABSOLUTE: dict[str, Callable[[str], str]] = {
    "cluster.ssh.hostfile": lambda path: os.path.abspath(path) if path else path,
    **dict.fromkeys(("run_dir", "checkpoint.url", "model.init_from", "model.init_from.url"), _absolute_url),
}


def _build(
    path: str, tree: Node, values: dict[str, Any], overrides: tuple[str, ...], folders: tuple[str, ...]
) -> LaunchConfig:
    kind = ScriptRunConfig if SCRIPT_KEY in values else RunConfig
    run_keys = schema_of(kind)
    resolved = {key: plain(value) for key, value in values.items()}
    return LaunchConfig(
        path=path,
        name=values["name"],
        run_dir=values["run_dir"],
        content=kind(**{key: value for key, value in values.items() if key in run_keys}),
        strategy=values.get("strategy", StrategyConfig()),
        cluster=values["cluster"],
        resolved=resolved,
        origins={key: _place(tree, key, DEFAULT) for key in flatten(resolved)},
        overrides=overrides,
        folders=folders,
    )


def _place(tree: Node, key: str, otherwise: str) -> str:
    """Where `key` was set; where it was not, the place of the innermost section around it that was."""
    node, place = tree, otherwise
    for part in key.split("."):
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
        else:
            break
        place = node.where if node.where != DEFAULT or otherwise == DEFAULT else place
    return place


def _in_order(problems: Sequence[Problem], path: str, files: Sequence[str]) -> list[Problem]:
    """By file and line, then the rest; each once. What goes wrong with a default is the config's to change."""
    placed = dict.fromkeys(replace(p, where=path) if p.where in (DEFAULT, "") else p for p in problems)

    def line(problem: Problem) -> tuple[int, int]:
        file, _, number = problem.where.rpartition(":")
        if file in files and number.isdigit():
            return files.index(file), int(number)
        return (files.index(problem.where), 0) if problem.where in files else (len(files), 0)

    return sorted(placed, key=line)


def dump_resolved(config: LaunchConfig) -> str:
    """The text of the run directory's config.yaml: runtime.config.read_run_config reads it back equal."""
    return "# Resolved by dtrain: what the nodes read. Change your own config, not this file.\n" + dump_yaml(
        config.resolved
    )


# ---- identity ----


def diff_identity(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """`model.layers: 4 -> 6` for everything that differs between two resolved configs: first what makes the new one
    another training, then the rest."""
    before, after = flatten(old), flatten(new)
    identity: list[str] = []
    rest: list[str] = []
    for key in dict.fromkeys([*after, *before]):
        if _same(before.get(key), after.get(key)):  # a key that one version does not know is as good as null
            continue
        line = f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        (identity if _is_identity(key) else rest).append(line)
    return identity, rest


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """The leaves by key path; empty lists and mappings are leaves."""
    children = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(children, Mapping) or not children:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, child in children.items():
        leaves |= flatten(child, f"{key}.{name}" if key else str(name))
    return leaves


def _is_identity(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in _IDENTITY)


def _same(old: Any, new: Any) -> bool:
    return bool(old == new or (old != old and new != new))  # nan is nan


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return dump_yaml(flat[key], flow=True) if key in flat else "(not there)"
