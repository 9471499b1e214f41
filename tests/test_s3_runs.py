"""Whole runs whose checkpoints lie on real S3 servers: one with conditional put (Ceph's gateway), one without (rclone).

A worker is killed, then the launching process and every node; the relaunched run's curve is, bit for bit, that of a run
on file:// to which nothing happened. Afterwards `ckpt gc` leaves nothing that no checkpoint names, and no secret was
written down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from launched import DTRAIN, Curve, Launched
from s3servers import S3Server, rclone

from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import open_storage
from dtrain.runtime.checkpoint.garbage import find_garbage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BUCKET, STEPS = "dtrain-runs", 48
CONFIG: dict[str, Any] = {
    "model": {"_target_": "parity.Transformer", "dropout": 0.1},
    "loss": "parity.mean_loss",
    "data": {"train": {"_target_": "parity.Tokens", "noise": 0.1, "delay_s": 0.015}, "batch_size": 13},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "train": {"steps": STEPS, "clip_grad_norm": 1.0},
    "checkpoint": {"every": 4},
    "cluster": {"nodes": 2},
    "strategy": "fsdp",
}


def ckpt(job: Launched, *words: str) -> tuple[int, str]:
    command: list[str | Path] = [DTRAIN, "ckpt", words[0], job.run.path, *words[1:]]
    environ = {**os.environ, **job.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def job(directory: Path, name: str, variables: Mapping[str, str]) -> Launched:
    config = directory / "cfg.yaml"
    config.write_text(json.dumps(CONFIG))
    return Launched(run=RunDir(directory / name), config=config, environ=variables)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The curve of a run on file:// to which nothing happens."""
    directory = tmp_path_factory.mktemp("whole")
    whole = job(directory, "run", {"HOME": str(directory), "XDG_STATE_HOME": str(directory / "state")})
    assert whole.finish() == 0, whole.said
    assert len(whole.curve()) == STEPS
    return whole.curve()


def test_on_a_server_with_conditional_put(uninterrupted: Curve, radosgw_server: S3Server, tmp_path: Path) -> None:
    kill_and_relaunch(uninterrupted, radosgw_server, tmp_path)


def test_on_a_server_without_conditional_put(uninterrupted: Curve, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    with rclone(objects) as server:
        kill_and_relaunch(uninterrupted, server, tmp_path)


def kill_and_relaunch(uninterrupted: Curve, server: S3Server, directory: Path) -> None:
    server.make_bucket(BUCKET)
    url = f"s3://{BUCKET}/runs/hurt"
    hurt = job(directory, "hurt", server.variables())
    more = [f"checkpoint.url={url}"]
    process = hurt.launch(*more)
    hurt.until_step(10)
    os.kill(hurt.worker(1), signal.SIGKILL)
    hurt.until(lambda: hurt.attempts() == 2, "attempt 2 after the loss of a worker")
    hurt.until_step(22)
    hurt.kill_everything(process)
    assert hurt.finish(*more) == 0, hurt.said
    assert hurt.events("resumed")[-1]["step"] >= 8
    assert hurt.curve() == uninterrupted
    assert ckpt(hurt, "verify")[0] == 0

    leave_behind(server)
    time.sleep(1.1)  # the store's clock counts whole seconds
    code, words = ckpt(hurt, "gc", "--older-than", "1s")
    assert code == 0, words
    assert_tidy(server, url)
    assert ckpt(hurt, "verify")[0] == 0
    assert_no_secrets(server, hurt.run.path, Path(os.environ["HOME"]))


def leave_behind(server: S3Server) -> None:
    """What a writer leaves that is killed between two requests."""
    key = "runs/hurt/step-00000046-a0001/rank-00001"
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=f"{key}.safetensors", Body=b"unnamed")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=f"{key}.index.json")["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=f"{key}.index.json", UploadId=upload, PartNumber=1, Body=b"half")


def assert_tidy(server: S3Server, url: str) -> None:
    client = server.client()
    if server.name != "rclone":  # it can't list them, and forgets them when it ends
        assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    assert not [key for key in keys if "/." in key]  # nothing of the store's own either
    with server.environment():
        garbage = find_garbage(open_storage(url), before=time.time() + 3600, last_attempt=99)
    assert (garbage.files, garbage.spared) == ((), ())
    assert all(key.startswith(("runs/hurt/step-", "runs/hurt/attempts/")) for key in keys)


def assert_no_secrets(server: S3Server, *directories: Path) -> None:
    found = [
        path
        for directory in directories
        for path in directory.rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in (server.key, server.secret))
    ]
    assert found == []
