"""Environment variables of a fork, as if its interpreter had been started with them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping


def adopt(environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))


@contextlib.contextmanager
def adopted(environ: Mapping[str, str]) -> Iterator[None]:
    """For a while."""
    before, path = dict(os.environ), list(sys.path)
    adopt(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path
