"""The back end slurm is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conformance
import engines
import pytest
from engines import Engine

if TYPE_CHECKING:
    from slurmcluster import SlurmCluster

globals().update(conformance.tests_of("slurm"))


@pytest.fixture
def engine(slurm: SlurmCluster) -> Engine:
    return engines.slurm(slurm)
