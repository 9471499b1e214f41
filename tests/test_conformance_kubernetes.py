"""The back end kubernetes is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import conformance
import engines
import pytest
from engines import Engine

if TYPE_CHECKING:
    from kubeserver import KubeServer

globals().update(conformance.tests_of("kubernetes"))


@pytest.fixture
def engine(kubernetes: KubeServer, tmp_path: Path) -> Engine:
    kubernetes.add_secret("keys", {"CANARY": conformance.CANARY})
    return engines.kubernetes(kubernetes, tmp_path, "keys")
