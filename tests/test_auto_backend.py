"""`cluster.backend: auto`: where a launch would go, and that it surprises nobody."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launched import DTRAIN

from dtrain.cluster.errors import UsageError
from dtrain.launcher import autobackend
from dtrain.launcher.autobackend import Surroundings, choose

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a laptop": ({}, "local", "this machine"),
    "a laptop with production's kubeconfig": ({"kubernetes": "prod"}, "local", "context is prod: --backend kubernetes"),
    "a Ray of this machine's own": ({"ray": True}, "local", "--backend ray"),
    "a pod": ({"environ": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}}, "local", "this is a pod"),
    "a login node": ({"slurm": "alpha", "kubernetes": "prod"}, "slurm", "sbatch answers (cluster alpha)"),
    "an allocation": ({"environ": {"SLURM_JOB_ID": "7", "PMI_RANK": "0"}, "slurm": "a"}, "slurm", "Slurm job 7"),
    "listed machines": ({"machines": True, "slurm": "alpha"}, "ssh", "cluster.ssh"),
    "a Ray by address": ({"environ": {"RAY_ADDRESS": "http://h:8265"}, "slurm": None}, "ray", "http://h:8265"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_chosen(case: str) -> None:
    found, backend, words = CASES[case]
    choice = choose(Surroundings(**{"environ": {}, **found}))
    assert choice.backend == backend
    assert words in choice.why
    assert backend == "local" or "--backend local" in choice.why


def test_what_is_not_guessed() -> None:
    with pytest.raises(UsageError, match=r"slurmctld does not answer.*--backend local"):
        choose(Surroundings(environ={}, slurm=None))
    with pytest.raises(UsageError, match="dtrain run"):
        choose(Surroundings(environ={"OMPI_COMM_WORLD_RANK": "0"}))


def test_a_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, good = tmp_path / "a", tmp_path / "b"
    broken.write_text("{")
    good.write_text("current-context: prod\n")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none:{broken}:{good}")
    assert autobackend._context() == "prod"


def test_a_launch_says_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)\n")
    listed = {"backend": "auto", "ssh": {"hosts": ["node1", "node2"]}}
    (tmp_path / "cfg.json").write_text(json.dumps({"script": "train.py", "cluster": listed}))
    done = subprocess.run([DTRAIN, "launch", "--dry-run", "cfg.json"], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("cluster.backend: auto is ssh: cluster.ssh lists machines; --backend local")
    assert "-- node1 " in done.stdout
