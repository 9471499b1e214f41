"""docs/config.md, generated: `python -m dtrain.launcher.reference > docs/config.md`. The dataclasses are the schema."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from dtrain.cluster.bind import MISSING, FieldSpec, Schema, arms_of, plain, schema_of
from dtrain.cluster.configfile import dump_yaml
from dtrain.launcher.compose import launch_schema, script_schema
from dtrain.runtime.config import Target
from dtrain.runtime.scriptconfig import ScriptCheckpointConfig

_HEAD = """\
# The config file

Written by `python -m dtrain.launcher.reference` from the dataclasses of the code; a test keeps it true.
`dtrain config cfg.yaml` prints every value of a config, defaults included, with the place that set it.

- **Notation.** YAML; `1e-4` is a number; write `true` and `false` (`yes`, `no`, `on` and `off` are refused without
  quotes); a key that is given twice or is unknown is an error.
- **Targets.** A dotted name of a callable and its keywords: `{_target_: package.module.name, key: value}`; without
  keywords just `package.module.name`. Modules are looked for beside the config file, then in the working directory,
  beside the files that the config extends, and in the environment. They are imported and their signatures checked
  before anything starts.
- **References.** `${key.path}` stands for another value, `${env:NAME}` for an environment variable, a leading `~/` for
  the home directory; `$${` is a literal `${`. The run directory's config.yaml has them written out: keep secrets away.
- **Command line.** `key.path=value` sets single values, list items by number: `optimizer.groups.0.weight_decay=0.1`.
  A mapping merges key by key; another `_target_` drops the keywords of the one before it.
- **Layers**, weakest first: the site's files, what the file `extends`, the file, the command line. `extends: base.yaml`
  (or a list of files) stands at the top level; its paths start at the folder of the file that says it, and a base may
  extend another. The site's files are /etc/dtrain/site.yaml (`DTRAIN_SITE` names another one) and
  ~/.config/dtrain/site.yaml; they set only `cluster`, `run_dir`, `checkpoint.url` and `track`. A list replaces a list.
- **Paths** that are relative start at the working directory.
"""
_SCRIPT = """\
## script

`script: train.py --epochs 3` runs a script of your own in the place of model, data, optimizer and the rest;
docs/scripts.md says what it may expect. The file is looked for beside the config file, then in the working directory;
`-m package.train` runs a module. The line is divided into words as a shell does it, and nothing else in it has a
meaning. All keys of such a config:
"""


def render() -> str:
    """The whole page."""
    schema = launch_schema()
    sections = {name: cls for name, spec in schema.items() if (cls := _section(spec.hint))}
    parts = [_HEAD, "## Top level\n", _table(schema)]
    for name, cls in sections.items():
        parts += [f"## {name}\n", _short(cls), _table(_keys(cls))]
        inner = {key: found for key, spec in schema_of(cls).items() if (found := _section(spec.hint))}
        for key, found in inner.items():
            parts += [f"### {name}.{key}\n", _short(found), _table(_keys(found))]
    parts += [_SCRIPT, _table(script_schema()), "### checkpoint of a script\n"]
    parts += [_short(ScriptCheckpointConfig), _table(_keys(ScriptCheckpointConfig))]
    return "\n".join(part for part in parts if part)


def _section(hint: Any) -> type | None:
    """The class whose fields get a table of their own."""
    classes = [arm for arm in arms_of(hint) if dataclasses.is_dataclass(arm) and arm is not Target]
    return typing.cast(type, classes[0]) if classes else None


def _keys(cls: type) -> Schema:
    """A field `target` is written as keys of the section itself."""
    return {"_target_" if name == "target" else name: spec for name, spec in schema_of(cls).items()}


def _short(cls: type) -> str:
    doc = (cls.__doc__ or "").strip()
    return "" if not doc or doc.startswith(f"{cls.__name__}(") else " ".join(doc.split()) + "\n"


def _table(schema: Schema) -> str:
    rows = ["| key | type | default | what it does |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {_type(spec)} | {_default(name, spec)} | {_escape(str(spec.metadata.get('doc', '')))} |"
        for name, spec in schema.items()
    ]
    return "\n".join(rows) + "\n"


def _type(spec: FieldSpec) -> str:
    arms = [arm for arm in arms_of(spec.hint) if arm is not type(None)]
    return _escape(" or ".join(dict.fromkeys(_one_type(arm) for arm in arms)) + _range(spec))


def _one_type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {_one_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {' or '.join(map(_one_type, arms_of(arguments[1])))}"
    if hint is Target:
        return "target"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(hint, "mapping")


def _range(spec: FieldSpec) -> str:
    low, high = spec.metadata.get("min"), spec.metadata.get("max")
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    return f", at least {low:g}" if low is not None else f", at most {high:g}" if high is not None else ""


def _default(name: str, spec: FieldSpec) -> str:
    if spec.default is MISSING:
        return "the file's stem" if name == "name" else "required"
    if spec.default is None:
        return ""
    if dataclasses.is_dataclass(spec.default):
        return "see below"
    return f"`{_escape(dump_yaml(plain(spec.default), flow=True))}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(render(), end="")
