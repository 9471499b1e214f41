"""Reads what is appended to a file while others write it. Survives a file that does not exist yet, that is replaced
by rename (a new attempt's metrics.jsonl) or shortened (a bounded log). What the lines mean is left to the caller."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any


class LineTail:
    """Complete lines, each once. Of a replaced file first the rest of the old one, then all of the new one."""

    def __init__(self, path: Path, *, from_end: bool = False, offset_bytes: int = 0) -> None:
        self.path = path
        self._file: io.BufferedReader | None = None
        self._rest = b""
        self._open(os.path.getsize(path) if from_end and path.exists() else offset_bytes)

    def poll(self) -> list[str]:
        """The lines that were completed since the last call, without their newlines."""
        if self._file is None:
            self._open(0)
        raw = self._read()
        if self._is_replaced():
            raw += self._read()  # what was appended between reading and looking
            self._open(0)
            raw += self._read()
        return [line.decode(errors="replace") for line in raw]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, offset_bytes: int) -> None:
        self.close()
        self._rest = b""
        try:
            # Held open between polls: only so is a replaced file read to its end.
            self._file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        self._file.seek(offset_bytes)

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0, os.SEEK_END)  # a bounded log dropped its middle: what is left has been seen
            self._rest = b""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return lines

    def _is_replaced(self) -> bool:
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False


class JsonTail:
    """The same for JSON lines. Anything that is no JSON object is passed over: the writer may have died inside it."""

    def __init__(self, path: Path, *, from_end: bool = False, offset_bytes: int = 0) -> None:
        self._lines = LineTail(path, from_end=from_end, offset_bytes=offset_bytes)

    def poll(self) -> list[dict[str, Any]]:
        records = []
        for line in self._lines.poll():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def close(self) -> None:
        self._lines.close()
