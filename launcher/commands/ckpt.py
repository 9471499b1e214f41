"""`dtrain ckpt COMMAND`: the commands for checkpoints, each a file ckpt_<command>.py with the shape of a command."""

from __future__ import annotations

import argparse
import importlib
from typing import cast

from dtrain.launcher.cli import Module

HELP = "List, inspect, verify and tidy up the checkpoints of a run or a store."
COMMANDS = ("ls", "show", "verify", "prune", "gc", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="ckpt_command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))


def run(args: argparse.Namespace) -> int:
    return _module(args.ckpt_command).run(args)


def _module(name: str) -> Module:
    return cast(Module, importlib.import_module(f"dtrain.launcher.commands.ckpt_{name}"))
