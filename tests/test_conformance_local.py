"""The back end local is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

import conformance
import engines
import pytest
from engines import Engine

globals().update(conformance.tests_of("local"))


@pytest.fixture
def engine() -> Engine:
    return engines.local()
