"""`dtrain launch`: its arguments. What it does is launcher/launching.py's, and in the script of a Slurm job,
which needs little of that and is waited for, launcher/injob.py's."""

from __future__ import annotations

import argparse

HELP = "Trains what the config describes, or continues it where its run directory has a checkpoint. Follows the run."


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What is said of a run, whoever starts its processes."""
    parser.add_argument("config", metavar="cfg.yaml", help="the config file")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="set single values of the config"
    )
    parser.add_argument("--name", help="the run's label; left out: the config's, or the file's stem")
    parser.add_argument("--run-dir", metavar="DIR", help="overrides run_dir; left out: runs/NAME")
    parser.add_argument(
        "--fresh", action="store_true", help="never continue: take the first free DIR, DIR-2, DIR-3, ..."
    )
    parser.add_argument(
        "--continue-changed", action="store_true", help="continue though model, data or optimizer differ"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="overrides cluster.nodes")
    parser.add_argument("--backend", metavar="B", help="overrides cluster.backend")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted and touch nothing")
    parser.add_argument("--detach", action="store_true", help="return when the job is submitted")
    parser.add_argument("--batch", action="store_true", help=argparse.SUPPRESS)  # what the script of a Slurm job calls
    parser.add_argument("--job-id", help=argparse.SUPPRESS)
    parser.add_argument(
        "--submit", action="store_true", help="inside a Slurm allocation: submit a job of its own instead of using it"
    )
    parser.add_argument("--here", action="store_true", help="one rank in this process and terminal; breakpoint() works")
    parser.set_defaults(allocation=None)  # the Slurm allocation that is used


def run(args: argparse.Namespace) -> int:
    if args.batch:
        from dtrain.launcher.injob import run_in_job

        return run_in_job(args)
    from dtrain.launcher.launching import launch

    return launch(args)
