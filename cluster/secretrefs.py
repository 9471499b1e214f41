"""An entry of `cluster.secrets`: `NAME`, a variable that was exported, or `NAME=file:PATH`, what a file holds. Only the
entries travel; a value is read where it is used, and no message here repeats one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.errors import UsageError

_ENTRY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:=file:(.*))?", re.DOTALL)
_MAX_BYTES = 1 << 17  # of one variable: Linux takes no longer ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    name: str
    path: Path | None = None  # of the file; `~` is the home of whoever reads it

    @property
    def file(self) -> Path | None:
        return None if self.path is None else self.path.expanduser()


def parse_secret(entry: str) -> Secret | None:
    """None where it is no such entry: it may be a value then."""
    found = _ENTRY.fullmatch(entry)
    if found is None or found[2] == "":
        return None
    return Secret(name=found[1], path=None if found[2] is None else Path(found[2]))


def parse_secrets(entries: Iterable[str]) -> list[Secret]:
    return [secret for secret in map(parse_secret, entries) if secret is not None]


def secret_values(entries: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Name -> value, also of those that `environ` has. A variable that is not set is left out. Raises UsageError."""
    exported = {secret.name: environ.get(secret.name, "") for secret in parse_secrets(entries)}
    return {name: value for name, value in {**exported, **file_values(entries)}.items() if value}


def file_values(entries: Iterable[str]) -> dict[str, str]:
    """Name -> value of those that lie in files, read now. Raises UsageError."""
    return {secret.name: _read(secret.file) for secret in parse_secrets(entries) if secret.file is not None}


def _read(path: Path) -> str:
    """The text without the line breaks at its end, which editors and `echo` put there."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1).rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Write the secret into it, readable for you alone.") from error
    if not raw:
        raise UsageError(f"{path} is empty. Write the secret into it.")
    if b"\0" in raw or len(raw) > _MAX_BYTES - 256:
        raise UsageError(f"{path} can't be the value of a variable: it holds a NUL byte, or more than 128 KiB.")
    return os.fsdecode(raw)
