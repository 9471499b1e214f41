"""The back end ssh is what every back end has to be: tests/assets/conformance.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conformance
import engines
import pytest
from engines import Engine

if TYPE_CHECKING:
    from sshhosts import SshHosts

globals().update(conformance.tests_of("ssh"))


@pytest.fixture
def engine(ssh_hosts: SshHosts) -> Engine:
    return engines.ssh(ssh_hosts)
