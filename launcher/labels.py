"""Which labels were launched from this account: one line a launch in ~/.local/state/dtrain/runs.jsonl.

Only a convenience: it lets a label be used from any directory. Losing the file loses nothing, so no error here stops
a launch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    name: str
    run_dir: str
    job_id: str
    submitted_at: float  # seconds since the epoch


def registry(environ: Mapping[str, str] = os.environ) -> Path:
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME", "/"), ".local", "state")
    return Path(home) / "dtrain" / "runs.jsonl"


def remember(label: Label) -> None:
    with contextlib.suppress(OSError):
        path = registry()
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(label), ensure_ascii=False) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # one write: launches at the same moment do not mix
        finally:
            os.close(descriptor)


def remembered() -> list[Label]:
    """Oldest first. Lines that are not ours are passed over."""
    try:
        text = registry().read_text(errors="replace")
    except OSError:
        return []
    labels = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            labels.append(Label(**json.loads(line)))
    return labels
