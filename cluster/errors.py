"""Every error that dtrain raises on purpose.

    DtrainError                 exit 1
    ├── UsageError              exit 2   what was asked can't be done; nothing was started
    │   └── ConfigError         exit 2   one or more Problems, each with file:line, key and a way out
    ├── UnclearError            exit 4   what was asked may have happened or not: look before asking again
    ├── NodeError           exit 93  a node can't take part, and could not if it were started again
    ├── StorageError            exit 1   a store refused, failed or ran full
    │   └── AlreadyExists       exit 1   put-if-absent lost the race
    ├── CheckpointError         exit 1   a checkpoint is missing, inconsistent or can't serve the request
    │   └── CorruptCheckpoint   exit 1   bytes that do not match their checksum
    └── FencedError             exit 1   a newer attempt has taken over: this process must stop

A message says what was asked, what was found, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.cluster import exits


class DtrainError(Exception):
    exit_code = exits.FAILED


class UsageError(DtrainError):
    exit_code = exits.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a config. `where` is "cfg.yaml:12", "command line" or "" where no place is known."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


class ConfigError(UsageError):
    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnclearError(DtrainError):
    exit_code = exits.UNKNOWN


class NodeError(DtrainError):
    exit_code = exits.NEVER_RETRY


class StorageError(DtrainError):
    pass


class AlreadyExists(StorageError):
    pass


class CheckpointError(DtrainError):
    pass


class CorruptCheckpoint(CheckpointError):
    """Names the step, the file and the tensor, so that a person can look and a relaunch can pass over the step."""

    def __init__(self, message: str, *, step: int, attempt: int, file: str, tensor: str) -> None:
        super().__init__(message)
        self.step = step
        self.attempt = attempt
        self.file = file
        self.tensor = tensor


class FencedError(DtrainError):
    pass
