"""`dtrain doctor`: looks at software, machine and storage, really tries them, and says what to do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.mirror import is_url
from dtrain.cluster.rundir import RunDir
from dtrain.launcher.console import plural
from dtrain.launcher.doctor import kubernetes, machine, scheduler, software, storage
from dtrain.launcher.doctor.finding import Finding

HELP = "Looks at this machine, its software and the storage of a config, tries them for real, and says what to do."
_STYLES = {"ok": "green", "warn": "yellow", "problem": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="cfg.yaml", nargs="?", help="whose run directory and checkpoint URL are tried"
    )
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="set single values of the config"
    )
    parser.add_argument(
        "--backend", choices=["kubernetes"], help="look at this engine, too; a config's is looked at anyway"
    )
    parser.add_argument("--url", action="append", default=[], metavar="URL", help="another store to try")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    findings = []
    for finding in _examine(args):
        findings.append(finding)
        if not args.json:
            _print(finding)
    problems = sum(finding.level == "problem" for finding in findings)
    if args.json:
        print(json.dumps([finding.to_json() for finding in findings], ensure_ascii=False))
    else:
        warnings = sum(finding.level == "warn" for finding in findings)
        print(f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}.")
    return exits.FAILED if problems else exits.DONE


def _examine(args: argparse.Namespace) -> Iterator[Finding]:
    python, workers, urls = sys.executable, 1, list(args.url)
    run_dir, plan = Path.cwd(), None
    if args.config:
        from dtrain.launcher.compose import load_config
        from dtrain.launcher.plan import make_plan

        config = load_config(args.config, args.overrides)
        plan = make_plan(config, job_id="doctor", argv=args.argv, cwd=str(Path.cwd()))
        loaders = int(config.resolved.get("data", {}).get("workers", 0))
        python = sys.executable if plan.backend == "kubernetes" else plan.python  # nobody can look into an image
        workers = plan.world_size * (1 + loaders)
        run_dir = RunDir(plan.run_dir).path
        urls += [plan.run_dir] if is_url(plan.run_dir) else []
        urls.insert(0, plan.checkpoint_url)
    yield from software.examine(python)
    yield from machine.examine(workers)
    yield from scheduler.examine()
    if args.backend == "kubernetes" or (plan is not None and plan.backend == "kubernetes"):
        yield from kubernetes.examine(plan)
    yield machine.free_space(run_dir)
    for url in dict.fromkeys(urls):
        yield from storage.examine(url)


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{finding.level:<8}", _STYLES[finding.level]), (f"{finding.name}: ", "bold"), finding.found)
    console = Console(highlight=False, soft_wrap=True)
    console.print(line)
    if finding.advice:
        console.print(Text(f"        {finding.advice}", style="dim" if finding.level == "ok" else ""))
