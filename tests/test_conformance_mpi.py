"""The back end mpi is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

import conformance
import engines
import pytest
from engines import Engine

globals().update(conformance.tests_of("mpi"))


@pytest.fixture
def engine() -> Engine:
    try:
        return engines.mpi()
    except LookupError as missing:
        pytest.skip(str(missing))
