"""The back end ray is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conformance
import engines
import pytest
from engines import Engine

if TYPE_CHECKING:
    from raycluster import RayCluster

globals().update(conformance.tests_of("ray"))


@pytest.fixture
def engine(ray: RayCluster) -> Engine:
    return engines.ray(ray)
