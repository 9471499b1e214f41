"""A Python for an ordinary user of the tests' cluster: this one where he can run it, else one of the system's with the
same packages. A Python below /root, for example, only root can run."""

from __future__ import annotations

import site
import subprocess
import sys
from pathlib import Path

from slurmcluster import SlurmCluster


def python_of(cluster: SlurmCluster, user: str) -> Path | None:
    """On the shared disk; below the user's home, where it is made. None where he may not read the checkout or its
    packages at all. Skips the test where there is no Python for him."""
    import pytest

    if _runs(cluster, user, Path(sys.executable)):
        return Path(sys.executable)
    system = Path(f"/usr/bin/python3.{sys.version_info[1]}")
    folder = cluster.home(user) / ".venv"
    made = system.exists() and subprocess.run([system, "-m", "venv", "--without-pip", folder], capture_output=True)
    if not made or made.returncode != 0:
        pytest.skip(f"an ordinary user can't run {sys.executable}: put it elsewhere, or: apt-get install {system.name}")
    (packages,) = (folder / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})\n" for path in _packages()]
    (packages / "as_the_tests.pth").write_text("".join(lines))
    python = folder / "bin" / "python"
    return python if _runs(cluster, user, python) else None


def _runs(cluster: SlurmCluster, user: str, python: Path) -> bool:
    # The shell in between: setpriv itself may still do what only root may.
    program = "import dtrain.cluster.errors, fsspec, yaml"
    trial = ["sh", "-c", f'exec "$0" -c "{program}"']
    return cluster.run(*trial, str(python), as_user=user, check=False).returncode == 0


def _packages() -> list[str]:
    """Folders whose .pth files count: those of an editable install are among them."""
    return [path for path in dict.fromkeys([*site.getsitepackages(), *sys.path]) if path.endswith("site-packages")]
