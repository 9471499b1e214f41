"""Ray's Jobs API, asked so that its answers can be trusted: a time limit on every question, and "no answer" told apart
from "no such job". What a job's state means for a run is cluster/ray/backend.py's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from dtrain.cluster.errors import DtrainError, UnclearError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_S = 10.0
_NO_SUCH_JOB = re.compile(r"status code 404\b.*does not exist")  # a 404 of whatever stands before Ray tells nothing
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NEEDED = ("ray", "aiohttp", "requests", "pydantic", "cryptography")
INSTALL = "pip install 'dtrain[ray]'"

Phase = Literal["pending", "running", "over"]


class RayUnreachable(UnclearError):
    """A question had no answer, or whether a request had an effect is not known."""


class RayRefused(DtrainError):
    """Ray has said no, in its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSeen:
    phase: Phase
    words: str = ""  # of a job that is over: how it ended
    exit_code: int | None = None  # of its entry point


def is_installed() -> bool:
    """With what the Jobs API's client and a sealed environment need."""
    return all(importlib.util.find_spec(name) is not None for name in _NEEDED)


class Jobs:
    """The Jobs API at one address. Raises UsageError where Ray is not installed here, RayUnreachable where nobody
    answers."""

    def __init__(self, address: str) -> None:
        if not is_installed():
            raise UsageError(f"cluster.backend: ray needs the package ray, which is not installed here. {INSTALL}")
        with _no_answer(), _only(address):
            self._client: Any = _client_class()(_given(address))

    @property
    def url(self) -> str:
        return str(self._client.get_address())

    def version(self) -> str:
        """Of the cluster's Ray."""
        with _no_answer():
            return str(self._client.ray_version())

    def submit(self, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        """Once: a job of this id that is there already is this one. Raises RayRefused."""
        try:
            with _no_answer():
                self._client.submit_job(submission_id=submission_id, entrypoint=entrypoint, metadata=metadata)
        except RayRefused as error:
            if self.look(submission_id) is None:
                raise RayRefused(str(error)) from None

    def look(self, submission_id: str) -> JobSeen | None:
        """None where there is no such job."""
        try:
            with _no_answer():
                found = self._client.get_job_info(submission_id)
        except RayRefused as error:
            if _NO_SUCH_JOB.search(str(error)):
                return None
            raise RayUnreachable(str(error)) from None
        status = found.status.value.lower()
        if status == "pending" or status == "running":
            return JobSeen(phase=status)
        lines = [line.strip() for line in (found.message or "").splitlines() if line.strip()]
        words = f"Ray job {submission_id} is {status}" + (f": {lines[-1]}" if lines and status == "failed" else "")
        return JobSeen(phase="over", words=words, exit_code=found.driver_exit_code)

    def stop(self, submission_id: str) -> None:
        """Ends its entry point. A job that is over or unknown needs none."""
        with contextlib.suppress(RayRefused), _no_answer():
            self._client.stop_job(submission_id)


@cache
def _client_class() -> type[JobSubmissionClient]:
    from ray.job_submission import JobSubmissionClient

    class Patient(JobSubmissionClient):
        """With a limit on its patience: Ray's own waits for ever."""

        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": ANSWER_S, **kwargs})

        def ray_version(self) -> str:
            return str(self._do_request("GET", "/api/version").json()["ray_version"])

    return Patient


def _given(address: str) -> str | None:
    """What Ray's client is to take for the address; None: it looks for a cluster of this machine."""
    if address != "auto":
        return address
    return next((value for name in _ADDRESSES if (value := os.environ.get(name))), None)


@contextlib.contextmanager
def _only(address: str) -> Iterator[None]:
    """Hides the variables that Ray's client prefers to the address that it is given."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _no_answer() -> Iterator[None]:
    """Ray's and requests' errors as ours."""
    import requests

    try:
        yield
    except (requests.RequestException, ConnectionError, TimeoutError, ValueError) as error:
        raise RayUnreachable(_words(error)) from None
    except RuntimeError as error:  # how the client tells of an answer that is none of 200
        raise RayRefused(_words(error)) from None


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
