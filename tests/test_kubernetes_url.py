"""A whole run on Kubernetes whose pods share nothing but a bucket: no volume, and the curve of a run in a folder
whatever is lost. What happens on the way is test_kubernetes.py's and test_run_url.py's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from launched import ASSETS, CONFIG, DTRAIN, Launched
from s3servers import S3Server, moto

from dtrain.cluster.rundir import RunDir, look_again, read_json

if TYPE_CHECKING:
    from kubeserver import KubeServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BUCKET = "dtrain-runs"
SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def bucket(kubernetes: KubeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with moto(kubernetes.host_address) as server, server.environment():
        server.make_bucket(BUCKET)
        kubernetes.add_secret("store", {name: server.variables()[name] for name in SECRET})
        yield server


@pytest.fixture
def hurt(kubernetes: KubeServer, bucket: S3Server, tmp_path: Path) -> Iterator[Launched]:
    shutil.copy(ASSETS / "parity.py", tmp_path)  # the pods have the code that travels, and no other
    cluster: dict[str, Any] = {
        "backend": "kubernetes",
        "nodes": 2,
        "cpus_per_proc": 1,
        "secrets": list(SECRET),
        "env": {name: value for name, value in bucket.variables().items() if name not in SECRET},
        "kubernetes": {"image": "dtrain:1", "user": 0, "grace_s": 20, "keep_s": 1, "secret": "store"},
    }
    config = tmp_path / "cfg.json"
    slow = {**CONFIG["data"], "train": {**CONFIG["data"]["train"], "delay_s": 0.1}}  # half a minute, to be hurt in
    config.write_text(json.dumps({**CONFIG, "data": slow, "run_dir": f"s3://{BUCKET}/runs/hurt", "cluster": cluster}))
    job = Launched(run=RunDir(f"s3://{BUCKET}/runs/hurt"), config=config)
    yield job
    argv = [DTRAIN, "cancel", job.run.place, "--grace", "10"]
    subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=100, check=False)
    kubernetes.wait(lambda: not any(map(kubernetes.store.objects, ("jobs", "pods", "services"))), 60)


def test_pods_that_share_a_bucket_and_nothing_else(kubernetes: KubeServer, hurt: Launched, tmp_path: Path) -> None:
    """The coordinator's machine, then an eviction, which saves and starts the job again."""
    local = {"cluster": {"nodes": 2, "cpus_per_proc": 1}}
    (tmp_path / "whole.json").write_text(json.dumps({**CONFIG, **local}))
    whole = Launched(run=RunDir(tmp_path / "whole"), config=tmp_path / "whole.json")
    assert whole.finish() == 0, whole.said

    assert hurt.finish("--detach") == 0, hurt.said
    hurt.until_step(6)
    pods = kubernetes.pods()
    assert {volume["name"] for pod in pods for volume in pod["spec"]["volumes"]} == {"shm"}
    first = next(pod for pod in pods if pod["metadata"]["name"].startswith(by_index(pods, 0)))
    kubernetes.kill_node(first["spec"]["nodeName"])
    hurt.until(lambda: followed(hurt) and hurt.attempts() >= 2, "attempt 2 after the loss of a machine")
    hurt.until_step(10)
    kubernetes.evict(by_index(kubernetes.pods(), 1))
    hurt.until(lambda: followed(hurt) and hurt.events("requeued"), "the start after an eviction")
    hurt.until(lambda: followed(hurt) and (read_json(hurt.control.ended) or {}).get("state") == "done", "the end")
    hurt.until(lambda: hurt.events("ended")[-1]["state"] == "done", "the last event")
    assert hurt.curve() == whole.curve()


def by_index(pods: list[dict[str, Any]], index: int) -> str:
    """The newest pod of a node."""
    own = [
        pod for pod in pods if pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
    ]
    return str(max(own, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))["metadata"]["name"])


def followed(job: Launched) -> bool:
    """Whoever asks takes a dead machine's pod away."""
    subprocess.run([DTRAIN, "status", job.run.place], stdout=subprocess.DEVNULL, check=False, env=dict(os.environ))
    look_again(job.run.path)
    return True
