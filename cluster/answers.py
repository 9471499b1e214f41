"""What an engine has said last of each job, so that a follower who looks often does not ask as often."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LastAnswers(Generic[T]):
    def __init__(self) -> None:
        self._by_job: dict[str, tuple[float, T]] = {}

    def get(self, job_id: str) -> T | None:
        return self._by_job[job_id][1] if job_id in self._by_job else None

    def ask(self, job_id: str, max_age_s: float, question: Callable[[], T]) -> T:
        """The last answer, or a new one where that is older."""
        if job_id not in self._by_job or time.monotonic() - self._by_job[job_id][0] > max_age_s:
            answer = question()
            self._by_job[job_id] = time.monotonic(), answer
        return self._by_job[job_id][1]
