"""`dtrain config`: the resolved config as YAML, each value with the place that set it as a trailing comment."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.configfile import dump_yaml
from dtrain.launcher.compose import LaunchConfig, load_config

HELP = "Prints the resolved config: every value, defaults included, with the file:line that set it."
_MAX_COLUMN = 60  # values longer than this push only their own comment
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="cfg.yaml", help="the config file")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="set single values of the config"
    )
    parser.add_argument("--json", action="store_true", help='{"config": {...}, "origins": {"key.path": "file:line"}}')


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if args.json:
        print(json.dumps({"config": config.resolved, "origins": config.origins}, indent=2))
    else:
        dim = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(render(config, dim=dim))
    return exits.DONE


def render(config: LaunchConfig, *, dim: bool) -> str:
    """YAML that loads to `config.resolved`, comments aligned."""
    lines = list(_lines(config.resolved, config.origins))
    column = min(_MAX_COLUMN, max(len(text) for text, _ in lines)) + 2
    before, after = (_DIM, _PLAIN) if dim else ("", "")
    return "\n".join(
        f"{text:<{column - 1}} {before}# {origin}{after}" if origin else text.rstrip() for text, origin in lines
    )


def _lines(value: Mapping[str, Any], origins: Mapping[str, str], key: str = "") -> Iterator[tuple[str, str]]:
    """(text, origin) of each line of a block mapping, not indented."""
    for name, child in value.items():
        path = f"{key}.{name}" if key else name
        label = dump_yaml(name, flow=True)
        if isinstance(child, Mapping) and child:
            yield f"{label}:", ""
            yield from (("  " + text, origin) for text, origin in _lines(child, origins, path))
        elif isinstance(child, list) and any(isinstance(item, Mapping) and item for item in child):
            yield f"{label}:", ""
            for index, item in enumerate(child):
                yield from _item(item, origins, f"{path}.{index}")
        else:
            place = origins.get(path) or origins.get(f"{path}.0", "")
            yield f"{label}: {dump_yaml(child, flow=True)}", place


def _item(item: Any, origins: Mapping[str, str], path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(item, Mapping) or not item:
        yield f"  - {dump_yaml(item, flow=True)}", origins.get(path, "")
        return
    for position, (text, origin) in enumerate(_lines(item, origins, path)):
        yield ("  - " if position == 0 else "    ") + text, origin
