"""The sections of a run that is a script of the user's own: `script: train.py --flags` in the place of model, data and
optimizer. What the script is told and how it is run is runtime/script.py's."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dtrain.cluster.bind import bind_fields, schema_of
from dtrain.cluster.configfile import Node, read_file
from dtrain.cluster.errors import ConfigError
from dtrain.runtime.config import RecoveryConfig, check_name

SCRIPT_KEY = "script"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is run: a file, or with `module` a module as `python -m` runs it; the other one is ""."""

    path: str
    module: str
    args: tuple[str, ...]


def parse_script(text: str) -> Script:
    """The words of a shell line, of which nothing is expanded. Raises ValueError with what to write."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"can't be divided into words: {error}. Check the quotes in {text!r}.") from error
    if words[:1] == ["-m"]:
        if len(words) < 2 or not _MODULE.fullmatch(words[1]):
            raise ValueError(f"-m expects the name of a module, like -m package.train; found {text!r}.")
        return Script(path="", module=words[1], args=tuple(words[2:]))
    if not words or words[0].startswith("-"):
        raise ValueError(f"expects a script and its arguments, like train.py --epochs 3; found {text!r}.")
    first = os.path.basename(words[0])
    if first in ("torchrun", "accelerate") or re.fullmatch(r"python[\d.]*", first):
        raise ValueError(
            f"names {first}, but dtrain starts a process a rank itself: begin with the script, like train.py."
        )
    return Script(path=words[0], module="", args=tuple(words[1:]))


def find_script(path: str, folders: Sequence[str]) -> Path | None:
    """The first of `folders` that has it: the config's own, then the working directory, as with targets."""
    places = (Path(folder, path) for folder in folders)  # an absolute path stays what it is
    return next((place.absolute() for place in places if place.is_file()), None)


def check_script(text: str) -> None:
    """Raises ValueError."""
    parse_script(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptCheckpointConfig:
    """A script saves when it calls `dtrain.runtime.checkpoint.save`, so there is no interval here."""

    url: str = field(
        default="${run_dir}/checkpoints",
        metadata={"doc": "where attempts are numbered, and what `session.checkpoint_url()` gives the script"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRunConfig:
    """A run of a script; besides these keys there are run_dir and cluster."""

    name: str = field(metadata={"doc": "a label; left out: the file's stem", "validate": check_name})
    script: str = field(
        metadata={
            "doc": "a script that torchrun runs, and its arguments: `train.py --epochs 3`, `-m package.train`",
            "validate": check_script,
        }
    )
    checkpoint: ScriptCheckpointConfig = field(
        default_factory=ScriptCheckpointConfig, metadata={"doc": "where the script's checkpoints go"}
    )
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig, metadata={"doc": "what happens after a failure"})
    track: tuple[Literal["tensorboard", "mlflow"], ...] = field(
        default=(), metadata={"doc": "where what the script reports is shown besides: `[tensorboard, mlflow]`"}
    )


def read_script_config(path: str | os.PathLike[str]) -> ScriptRunConfig:
    """The run directory's config.yaml of a script. Raises ConfigError."""
    node, problems = read_file(path)
    if node is None or not isinstance(node.value, dict):
        raise ConfigError(problems)
    schema = schema_of(ScriptRunConfig)
    own = {key: child for key, child in node.value.items() if key in schema}
    values, found = bind_fields(schema, Node(own, node.where))
    if problems or found:
        raise ConfigError([*problems, *found])
    return ScriptRunConfig(**values)
