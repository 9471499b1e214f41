"""`dtrain ckpt ls`: every committed checkpoint in a store."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.storage import Storage
from dtrain.launcher.checkpoints import add_where, find_place
from dtrain.launcher.console import number, size
from dtrain.runtime.checkpoint.scores import Ranking, Scores, rank
from dtrain.runtime.checkpoint.survey import Surveyed, newest_whole, survey

HELP = "every committed checkpoint; the newest live one is where a run goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)


def run(args: argparse.Namespace) -> int:
    storage = find_place(args.where).storage
    found = survey(storage)
    ranking = rank([one.info for one in found], Scores(storage))
    if args.json:
        print(json.dumps([row(storage, one, ranking) for one in found], ensure_ascii=False))
    elif not found:
        print(f"No checkpoints in {storage.url}.")
    else:
        _print_table(storage, found, ranking)
    return exits.DONE


def row(storage: Storage, one: Surveyed, ranking: Ranking) -> dict[str, Any]:
    """The documented record; what a manifest says is null where it is damaged."""
    info, manifest = one.info, one.manifest
    return {
        "step": info.step,
        "attempt": info.attempt,
        "live": info.live,
        "url": f"{storage.url}/{info.dir}",
        "bytes": manifest and manifest.size_bytes,
        "committed_at": info.committed_at,
        "strategy": manifest and manifest.strategy.get("name"),
        "world_size": manifest and manifest.world_size,
        "damage": "; ".join(one.damages) or None,
        "metrics": ranking.metrics.get(info.dir),
        "best": info.dir in ranking.best,
    }


def _print_table(storage: Storage, found: list[Surveyed], ranking: Ranking) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("STEP", "ATTEMPT"):
        table.add_column(name, justify="right")
    for name in ("STATE", "SIZE", "STRATEGY", "RANKS", "COMMITTED"):
        table.add_column(name)
    if ranking.metrics:
        table.add_column("EVALUATED")
    newest = newest_whole(found)
    for one in found:
        manifest = one.manifest
        table.add_row(
            str(one.info.step),
            str(one.info.attempt),
            "newest" if one is newest else _state(one),
            "?" if manifest is None else size(manifest.size_bytes),
            str(manifest.strategy.get("name", "?")) if manifest else "?",
            str(manifest.world_size) if manifest else "?",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.info.committed_at)),
            *([_evaluated(one, ranking)] if ranking.metrics else []),
        )
    console = Console()
    console.width = max(console.width, 110)  # a time that is cut in two is worse than a line that the terminal wraps
    console.print(storage.url, highlight=False, soft_wrap=True)
    console.print(table)
    for one in found:
        for what in one.damages:
            console.print(f"damaged: {one.info.dir}: {what}", style="red", highlight=False, soft_wrap=True)
    if any(one.damages and one.info.live for one in found):
        console.print("a relaunch passes over damaged ones; `dtrain ckpt verify` reads every byte", style="dim")
    if any(not one.info.live for one in found):
        console.print("dead: committed by an attempt that was replaced before; never loaded", style="dim")


def _evaluated(one: Surveyed, ranking: Ranking) -> str:
    """`loss 2.3411, best`"""
    metrics, name = ranking.metrics.get(one.info.dir), ranking.rule.metric
    if metrics is None or name not in metrics:
        return ""
    value = "not finite" if metrics[name] is None else number(metrics, name)
    return f"{name} {value}{', best' if one.info.dir in ranking.best else ''}"


def _state(one: Surveyed) -> str:
    return ("live" if one.info.live else "dead") + (", damaged" if one.damages else "")
