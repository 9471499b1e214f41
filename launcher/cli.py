"""The command line: finds the command, imports its module and no other, and turns errors into words and exit codes.

What a command takes and does is its own file in launcher/commands: HELP, add_arguments(parser), run(args) -> exit code.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Protocol, cast

from dtrain.cluster import exits
from dtrain.cluster.errors import ConfigError, DtrainError, UsageError

BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


class Module(Protocol):
    """A file of launcher/commands."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """`args.argv` is what the person typed, the program first. Returns the exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    name: str
    help: str
    overrides: bool = False  # takes `cfg.yaml [key=value ...]`, options anywhere among them


COMMANDS = (
    Command(name="launch", help="train what a config file describes", overrides=True),
    Command(name="run", help="the same under mpirun or srun --mpi, on the ranks that these start", overrides=True),
    Command(name="init", help="write a config and a module that train as they are"),
    Command(name="config", help="the resolved config, each value with its file:line", overrides=True),
    Command(name="ls", help="the runs that you launched from this account"),
    Command(name="status", help="where a run stands"),
    Command(name="logs", help="what the workers of a run printed"),
    Command(name="attach", help="follow a run that is going on"),
    Command(name="cancel", help="stop a run and mark it cancelled (launch goes on from there)"),
    Command(name="stack", help="where each rank of a run is in its code"),
    Command(name="verify", help="a strategy against one process: where they part and why", overrides=True),
    Command(name="ckpt", help="list, show, verify and tidy up checkpoints"),
    Command(name="doctor", help="try machine, software and storage, and say what to do", overrides=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: users' texts may hold anything
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        _say(_config_words(error))
        return error.exit_code
    except DtrainError as error:
        _say(f"dtrain: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("")
        return exits.DETACHED
    except BrokenPipeError:
        # The reader (head, a pager) has gone. Without this the interpreter would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        _say(f"dtrain: {error}")
        return exits.FAILED


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return exits.DONE if words else exits.USAGE
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"dtrain {version('dtrain')}")
        return exits.DONE
    command = find_command(words[0])
    module = cast(Module, importlib.import_module(f"dtrain.launcher.commands.{command.name}"))
    parser = argparse.ArgumentParser(prog=f"dtrain {command.name}", description=module.HELP)
    module.add_arguments(parser)
    parse = parser.parse_intermixed_args if command.overrides else parser.parse_args
    args = parse(words[1:])
    args.argv = (*program(), *words)
    return module.run(args)


def find_command(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else f"There are: {', '.join(names)}."
    if name.endswith((".yaml", ".yml")):
        hint = f"To train it: dtrain launch {name}"
    raise UsageError(f'"{name}" is no command. {hint}')


def program() -> tuple[str, ...]:
    """How a person at this prompt starts dtrain: printed commands must work when they are pasted."""
    typed = sys.argv[0]
    if shutil.which("dtrain"):
        return ("dtrain",)
    return (typed,) if os.path.basename(typed) == "dtrain" else (sys.executable, "-m", "dtrain.launcher.cli")


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = ["usage: dtrain COMMAND ...", "", "One YAML file trains a PyTorch model over a cluster.", "", "commands:"]
    lines += [f"  {command.name:<{width}}  {command.help}" for command in COMMANDS]
    lines += [
        "",
        "RUN is a label, a run directory or a job id. `dtrain COMMAND --help` says more; --version says which.",
    ]
    return "\n".join(lines)


def _config_words(error: ConfigError) -> str:
    count = len(error.problems)
    return "\n".join([*map(str, error.problems), f"dtrain: {count} problem{'s' * (count != 1)}; nothing was started."])


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


if __name__ == "__main__":
    sys.exit(main())
