"""What scontrol, squeue and sacct print -> JobRecords and states. Pure text in, data out, and no JSON: that came late
and needs plugins. Asking them is slurm/client.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

Phase = Literal["pending", "running", "completing", "over"]

_PENDING = frozenset(
    (
        "PENDING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
        "POWER_UP_NODE",
    )
)
_COMPLETING = frozenset(("COMPLETING", "STAGE_OUT"))
_OVER = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    )
)
NO_TIME = frozenset(("Unknown", "None", "N/A", "NONE", ""))

SQUEUE_FORMAT = "%A|%T|%V|%S|%e|%N|%r|%o"  # the two that may hold anything are last
SACCT_FORMAT = "JobIDRaw,State,ExitCode,Submit,Start,End,NodeList"

# `scontrol show job` does not quote. What a person chose freely is JobName, and Command and all behind it; between
# those two every value is one word, so the first of each is the true one. 25.x has SubmitLine behind Command.
_RECORD = re.compile(r"^JobId=\d+ (?:\w+=\S* )*?JobName=", re.MULTILINE)
_HEAD = re.compile(
    r"JobId=(?P<id>\d+) (?P<ids>(?:\w+=\S* )*?)JobName=(?P<name>.*?)"
    r"(?:\s+HetJobIdSet=\S+)?\s+UserId=(?P<user>\S*?)\(\d+\) ",
    re.DOTALL,
)
_WORD = re.compile(r"(?:^|\s)([A-Z][\w/:.-]*)=(\S*)")
_COMMAND = re.compile(r"\sCommand=(?P<command>.*?)(?:\s+SubmitLine=.*?)?\s+WorkDir=(?P<rest>.*)", re.DOTALL)
_OUTPUT = re.compile(r"\sStdOut=(.*?)(?=\s+[A-Z]\w+=|\s*\Z)", re.DOTALL)
_SQUEUE_LINE = re.compile(r"\d+\|[A-Z_]+\|")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as Slurm tells it. Times are seconds since the epoch, None where there is none yet or no more."""

    job_id: int
    state: str  # Slurm's word: RUNNING
    name: str = ""
    user: str = ""
    partition: str = ""
    reason: str = ""  # why it waits, or why it ended; "" for None
    exit_code: int = 0
    exit_signal: int = 0
    restarts: int = 0
    may_requeue: bool = True
    nodes: str = ""  # a host list
    num_nodes: int = 0
    batch_host: str = ""
    command: str = ""  # the script's path, and its arguments behind it
    stdout: str = ""
    submitted_at: float | None = None
    starts_at: float | None = None  # expected, for one that waits
    ends_at: float | None = None  # by its time limit, for one that runs
    preempted_at: float | None = None  # since when it is being pushed out, until it starts again
    excluded: str = ""  # nodes that it must not have, a host list
    array_job_id: int | None = None
    het_job_id: int | None = None
    het_offset: int | None = None

    @property
    def phase(self) -> Phase:
        return classify(self.state)


def classify(state: str) -> Phase:
    """A state that this version does not know counts as running: nobody must take such a job for gone."""
    word = state.split()[0].rstrip("+") if state.strip() else ""  # sacct: "CANCELLED by 1000", and cut off with "+"
    for words, phase in _PHASES:
        if word in words:
            return phase
    return "running"


_PHASES: tuple[tuple[frozenset[str], Phase], ...] = (
    (_PENDING, "pending"),
    (_COMPLETING, "completing"),
    (_OVER, "over"),
)


# ---- scontrol -o show job ----


def parse_scontrol(text: str) -> list[JobRecord]:
    """The records of `scontrol -o show job`: several for a heterogeneous job or an array. Line breaks inside of values
    are tolerated, so the long form without -o is read too."""
    starts = [match.start() for match in _RECORD.finditer(text)]
    records = [_job_record(text[start:end]) for start, end in pairwise([*starts, len(text)])]
    return [record for record in records if record is not None]


def _job_record(text: str) -> JobRecord | None:
    head = _HEAD.match(text)
    if head is None:
        return None
    tail = _COMMAND.search(text, head.end())  # an interactive job has none
    middle = text[head.end() : tail.start() if tail else len(text)]
    words: dict[str, str] = {}
    for key, value in _WORD.findall(middle):
        words.setdefault(key, value)
    ids = dict(_WORD.findall(head["ids"]))
    output = _OUTPUT.search(tail["rest"]) if tail else None
    code, _, number = words.get("ExitCode", "0:0").partition(":")
    return JobRecord(
        job_id=int(head["id"]),
        name=head["name"],
        user=head["user"],
        state=words.get("JobState", ""),
        reason=_present(words, "Reason").replace("_", " "),
        exit_code=_number(code),
        exit_signal=_number(number),
        restarts=_number(words.get("Restarts", "")),
        may_requeue=words.get("Requeue") != "0",
        partition=words.get("Partition", ""),
        nodes=_present(words, "NodeList"),
        num_nodes=_number(words.get("NumNodes", "").split("-")[0]),
        batch_host=_present(words, "BatchHost"),
        command=tail["command"] if tail and tail["command"] != "(null)" else "",
        stdout=output[1] if output else "",
        submitted_at=seconds(words.get("SubmitTime", "")),
        starts_at=seconds(words.get("StartTime", "")),
        ends_at=seconds(words.get("EndTime", "")),
        preempted_at=seconds(words.get("PreemptTime", "")),
        excluded=_present(words, "ExcNodeList"),
        array_job_id=_optional(ids, "ArrayJobId"),
        het_job_id=_optional(ids, "HetJobId"),
        het_offset=_optional(ids, "HetJobOffset"),
    )


def _present(words: Mapping[str, str], key: str) -> str:
    value = words.get(key, "")
    return "" if value in ("(null)", "None", "N/A") else value


def _optional(words: Mapping[str, str], key: str) -> int | None:
    return int(words[key]) if words.get(key, "").isdigit() else None


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def seconds(text: str) -> float | None:
    """Slurm's local times, like 2026-11-22T10:15:30, since the epoch; None for Unknown and the like."""
    if text in NO_TIME:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


# ---- squeue -h -o SQUEUE_FORMAT ----


def parse_squeue(text: str) -> list[JobRecord]:
    """The records of `squeue --noheader --format SQUEUE_FORMAT`. A line that begins no record goes on with a command
    that has line breaks."""
    lines: list[str] = []
    for line in text.splitlines():
        if _SQUEUE_LINE.match(line) or not lines:
            lines.append(line)
        else:
            lines[-1] += "\n" + line
    return [_queue_record(line) for line in lines if _SQUEUE_LINE.match(line)]


def _queue_record(line: str) -> JobRecord:
    job_id, state, submit, start, end, nodes, reason, command = (line.split("|", 7) + [""] * 8)[:8]
    return JobRecord(
        job_id=int(job_id),
        state=state,
        submitted_at=seconds(submit),
        starts_at=seconds(start),
        ends_at=seconds(end),
        nodes=nodes,
        reason="" if reason in ("None", "(null)") else reason.replace("_", " "),
        command="" if command == "(null)" else command,
    )


# ---- sacct -P ----


def parse_sacct(text: str) -> list[JobRecord]:
    """The jobs, without their steps, of `sacct --parsable2 --noheader --format SACCT_FORMAT`; with --duplicates one for
    each start of a requeued job, the newest last."""
    records = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != len(SACCT_FORMAT.split(",")) or not fields[0].isdigit():
            continue  # 123.batch, 123.0
        job_id, state, exit_code, submit, start, end, nodes = fields
        code, _, number = exit_code.partition(":")
        records.append(
            JobRecord(
                job_id=int(job_id),
                state=state.split()[0] if state else "",
                reason=state.partition(" ")[2],
                exit_code=_number(code),
                exit_signal=_number(number),
                submitted_at=seconds(submit),
                starts_at=seconds(start),
                ends_at=seconds(end),
                nodes="" if nodes == "None assigned" else nodes,
            )
        )
    return records


# ---- sbatch --version ----


@dataclass(frozen=True, slots=True, order=True)
class SlurmVersion:
    """A release by year and month: 22.05.8."""

    year: int
    month: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.year}.{self.month:02}.{self.patch}"


OLDEST = SlurmVersion(20, 11)  # the first in which a step takes a whole allocation only when it is asked to


def parse_version(text: str) -> SlurmVersion | None:
    """From `sbatch --version`: "slurm 23.11.10-2", "slurm-wlm 22.05.8"; None where it is something else."""
    found = re.search(r"\bslurm(?:-wlm)?\s+(\d+)\.(\d+)(?:\.(\d+))?", text)
    return SlurmVersion(int(found[1]), int(found[2]), int(found[3] or 0)) if found else None
