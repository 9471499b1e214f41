"""`dtrain verify`: does a strategy learn what one process learns? A few steps of both, and where they part and why."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator

from dtrain.cluster import exits
from dtrain.launcher.console import plural
from dtrain.launcher.verifying import Answer, verify
from dtrain.runtime.verify.verdict import Finding, Verdict

HELP = (
    "Runs a few steps of the config's strategy on ranks of this machine, and of one process on the same samples; says "
    "where they part first and what makes such a difference, or that there is none beyond rounding. Exit code 0: "
    "equal, 1: they differ."
)
_SHOWN = 4
_WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="cfg.yaml", help="the config file")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="set single values of the config"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="STRATEGY",
        help="another strategy than the config's: a name, or {name: fsdp, replicate: 2}; may be given several times",
    )
    parser.add_argument("--steps", type=_positive, default=5, metavar="K", help="optimizer steps (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expects at least 1, found {number}")
    return number


def run(args: argparse.Namespace) -> int:
    answers = []
    for answer in verify(args.config, args.overrides, args.against, steps=args.steps, argv=args.argv):
        answers.append(answer)
        if not args.json:
            print("\n".join(lines(answer)), flush=True)
    if args.json:
        print(json.dumps([to_json(answer) for answer in answers], indent=2))
    return exits.DONE if all(answer.verdict.equal for answer in answers) else exits.FAILED


def to_json(answer: Answer) -> dict[str, object]:
    asked = answer.asked
    head = {"name": asked.config.name, "strategy": asked.config.resolved["strategy"]}
    return {**head, "world_size": asked.plan.world_size, **answer.verdict.to_json()}


def lines(answer: Answer) -> Iterator[str]:
    asked, verdict = answer.asked, answer.verdict
    ranks = f"{asked.words} on {plural(asked.plan.world_size, 'rank')}"
    yield f"{asked.config.name}: {ranks} against one process, {plural(verdict.steps, 'step')}"
    yield from _differs(verdict.finding) if verdict.finding else _equal(verdict)
    if verdict.indifferent:
        names = ", ".join(verdict.indifferent[:_SHOWN]) + (", ..." if len(verdict.indifferent) > _SHOWN else "")
        yield from _wrapped("not compared", f"{names}: the loss does not react beyond rounding")
    for note in verdict.notes:
        yield from _wrapped("note", note)


def _equal(verdict: Verdict) -> Iterator[str]:
    yield "  no difference beyond rounding; the largest ones, relative:"
    for quantity, largest in verdict.largest.items():
        of = f"{largest.tensor}, " if largest.tensor else ""
        yield f"    {quantity:<22} {largest.relative:.1e}  {of}step {largest.step}"


def _differs(finding: Finding) -> Iterator[str]:
    when = f"in step {finding.step}" if finding.step else "before the first step"
    yield f"  THEY DIFFER: {finding.cause.value}"
    yield f"  first        {finding.quantity}{f' of {finding.tensor}' if finding.tensor else ''}, {when}"
    for number, line in enumerate(finding.evidence):
        yield from _wrapped("" if number else "evidence", line)
    yield from _wrapped("look at", finding.advice)


def _wrapped(label: str, text: str) -> Iterator[str]:
    for number, line in enumerate(textwrap.wrap(text, _WIDTH - 15, break_on_hyphens=False)):
        yield f"  {'' if number else label:<13}{line}"
