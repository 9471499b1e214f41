"""A whole run on a Kubernetes of four nodes (tests/assets/kubeserver.py): the same curve as on one machine whatever is
lost. What every back end shows is test_conformance_kubernetes.py's, launches that are killed those of
test_kubernetes_schedules.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from launched import ASSETS, CONFIG, DTRAIN, Launched

from dtrain.cluster import exits
from dtrain.cluster.kubernetes.rights import POD_RIGHTS
from dtrain.cluster.rundir import RunDir, read_json

if TYPE_CHECKING:
    from kubeserver import KubeServer

Launcher = Callable[..., Launched]


@pytest.fixture
def launched(kubernetes: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """launched(name, **keys of cluster.kubernetes) -> Launched; on the local back end with local=True."""
    made: list[Launched] = []
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    shutil.copy(ASSETS / "parity.py", tmp_path)  # the pods have the code that travels, and no other

    def make(name: str, *, local: bool = False, nodes: int = 2, **keys: Any) -> Launched:
        config = tmp_path / f"{name}.json"
        asked = {
            "image": "dtrain:1",
            "user": 0,
            "grace_s": 20,
            "keep_s": 1,
            "volumes": {str(tmp_path): f"host:{tmp_path}"},
            **keys,
        }
        cluster: dict[str, Any] = {"nodes": nodes, "cpus_per_proc": 1}
        if not local:
            cluster |= {"backend": "kubernetes", "kubernetes": asked}
        config.write_text(json.dumps({**CONFIG, "cluster": cluster}))
        made.append(Launched(run=RunDir(tmp_path / name), config=config))
        return made[-1]

    yield make
    for one in made:
        if one.run.job.exists():
            argv = [DTRAIN, "cancel", str(one.run.path), "--grace", "10"]
            subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=100, check=False)
    kubernetes.wait(lambda: not any(map(kubernetes.store.objects, ("jobs", "pods", "services"))), 60)


def by_index(kubernetes: KubeServer) -> dict[int, dict[str, Any]]:
    """Node rank -> its newest pod."""
    pods = sorted(kubernetes.pods(), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return {int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): pod for pod in pods}


def worker_of(kubernetes: KubeServer, job: Launched, index: int) -> psutil.Process:
    """The worker of a node with one. Its number is that of its pod's namespace, the last that /proc tells."""
    inside = next(worker["pid"] for worker in _status(job)["workers"] if worker["node"] == index)
    pod = by_index(kubernetes)[index]["metadata"]["name"]
    outer = [psutil.Process(pid) for pid in kubernetes.pod_processes(pod)]
    for process in [one for top in outer for one in (top, *top.children(recursive=True))]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            numbers = re.findall(r"NSpid:(.*\n)", Path(f"/proc/{process.pid}/status").read_text())[0]
            if numbers.endswith(f"\t{inside}\n"):
                return process
    raise AssertionError(f"no process {inside} in the pod of node {index}")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_same_curve_whatever_is_lost(launched: Launcher, kubernetes: KubeServer) -> None:
    """A worker (no pod is made anew), a machine, then an eviction, which saves first: a local run's curve, and nobody
    followed it."""
    from kubeserver_access import Rule

    whole = launched("whole", local=True)
    assert whole.finish() == 0, whole.said

    rules = [Rule(groups=(right.group,), resources=(right.resource,), verbs=right.verbs) for right in POD_RIGHTS]
    kubernetes.add_service_account("dtrain", rules)
    hurt = launched("hurt", service_account="dtrain")
    assert hurt.finish("--detach") == 0, hurt.said
    hurt.until_step(6)
    before = {pod["metadata"]["uid"] for pod in kubernetes.pods()}
    os.kill(worker_of(kubernetes, hurt, 0).pid, signal.SIGKILL)
    hurt.until(lambda: len(hurt.events("attempt_started")) == 2, "attempt 2 after the loss of a worker")
    assert {pod["metadata"]["uid"] for pod in kubernetes.pods()} == before

    hurt.until_step(14)
    kubernetes.kill_node(by_index(kubernetes)[1]["spec"]["nodeName"])
    hurt.until(lambda: len(hurt.events("attempt_started")) == 3, "attempt 3 after the loss of a machine")

    hurt.until_step(22)
    kubernetes.evict(by_index(kubernetes)[0]["metadata"]["name"])
    hurt.until(lambda: hurt.events("requeued"), "the start after an eviction")
    hurt.until(lambda: read_json(hurt.control.ended) and hurt.events("ended")[-1]["state"] == "done", "the end")
    assert hurt.curve() == whole.curve()


def _status(job: Launched) -> dict[str, Any]:
    return dict(json.loads(subprocess.check_output([DTRAIN, "status", "--json", job.run.path])))


@pytest.mark.e2e
def test_what_is_wrong_is_said_before_anything_starts(launched: Launcher, kubernetes: KubeServer) -> None:
    job = launched("wrong", image="", volumes={})
    assert job.finish("cluster.secrets=[TOKEN]") == exits.USAGE
    for key in ("cluster.kubernetes.image", "run_dir", "checkpoint.url", "cluster.secrets.0"):
        assert f"{key}: " in job.said
    assert launched("refused", pod={"tolerance": []}).finish() == exits.USAGE
    assert 'unknown field "spec.template.spec.tolerance"' in launched("refused").said
    assert not kubernetes.store.objects("jobs")
