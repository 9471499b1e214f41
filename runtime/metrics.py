"""metrics.jsonl and evaluations.jsonl: each step once. Written by global rank 0; a new attempt replaces what
it computes again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain.cluster.rundir import read_jsonl, write_atomic


def clean(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite become null, and are named under "nonfinite"."""
    bad = {key: str(value) for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    if not bad:
        return record
    return {key: None if key in bad else value for key, value in record.items()} | {"nonfinite": bad}


class MetricsLog:
    """Keeps the records up to `last_kept` and appends the rest. The old file is replaced, not cut: a process of an
    earlier attempt that wakes up late writes into a file that has no name any more."""

    def __init__(self, path: Path, last_kept: int) -> None:
        kept = [record for record in read_jsonl(path) if record["step"] <= last_kept]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(clean(record)) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
