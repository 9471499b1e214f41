"""What a partition gives at most, against what is asked for: sbatch accepts a job that is too large and lets it wait
for ever. Pure; asking is slurm/batch.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.slurmconfig import time_limit_s

_WORD = re.compile(r"(?:^|\s)([A-Z]\w*)=(\S*)")


def parse_partitions(text: str) -> list[dict[str, str]]:
    """The records of `scontrol -o show partition`."""
    return [dict(_WORD.findall(line)) for line in text.splitlines() if line.startswith("PartitionName=")]


def over_limits(plan: JobPlan, partitions: list[dict[str, str]]) -> str:
    """Why the job would never start; "" where a partition that it may use takes it."""
    known = {partition["PartitionName"]: partition for partition in partitions}
    asked = plan.slurm.partition.split(",") if plan.slurm.partition else _defaults(partitions)
    missing = [name for name in asked if name not in known]
    if not known or not asked:
        return ""  # nothing is known of them; sbatch decides
    if missing:
        return f"cluster.slurm.partition: there is no {', '.join(missing)}. There are: {', '.join(sorted(known))}."
    problems = [list(_problems(plan, known[name])) for name in asked]
    return "" if not all(problems) else problems[0][0]


def _defaults(partitions: list[dict[str, str]]) -> list[str]:
    return [partition["PartitionName"] for partition in partitions if partition.get("Default") == "YES"]


def _problems(plan: JobPlan, partition: dict[str, str]) -> Iterator[str]:
    where = f"but partition {partition['PartitionName']}"
    total, most, least = (_count(partition.get(key, "")) for key in ("TotalNodes", "MaxNodes", "MinNodes"))
    asked = f"cluster.nodes: {plan.nodes} nodes"
    if total is not None and plan.nodes > total:
        yield f"{asked}, {where} has {total}. Ask for {total} at most, or name another."
    elif most is not None and plan.nodes > most:
        yield f"{asked}, {where} gives a job {most} at most. Ask for less, or name another."
    if least is not None and plan.nodes < least:
        yield f"{asked}, {where} takes jobs of {least} or more. Ask for more, or name another."
    time, limit = plan.slurm.time, partition.get("MaxTime", "")
    if time and limit and not _fits(time, limit):
        yield f"cluster.slurm.time: {time}, {where} gives {limit} at most. Ask for less: it goes on (on_stop)."


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _fits(asked: str, limit: str) -> bool:
    try:
        asked_s, limit_s = time_limit_s(asked), time_limit_s(limit)
    except ValueError:
        return True
    return limit_s is None or (asked_s is not None and asked_s <= limit_s)
