"""`dtrain doctor`: what is right is called right, and each broken thing is named with a way out."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from s3servers import environment, moto

from dtrain.cluster.filestore import FileStorage
from dtrain.launcher.cli import main
from dtrain.launcher.doctor import machine, software, storage

pytestmark = pytest.mark.slow

DTRAIN = Path(sys.executable).parent / "dtrain"


def doctor(*words: str) -> tuple[int, dict[tuple[str, str], list[dict[str, Any]]]]:
    done = subprocess.run([DTRAIN, "doctor", "--json", *words], capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    findings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        findings.setdefault((finding["topic"], finding["name"]), []).append(finding)
    return done.returncode, findings


def test_this_machine_is_fit_and_nothing_stays_behind(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/new/folder"
    code, findings = doctor("--url", url)
    assert {finding["level"] for found in findings.values() for finding in found} <= {"ok", "warn"}
    assert code == 0
    assert len(findings["storage", url]) == 5
    assert findings["software", "torch"][0]["found"].startswith("2.")
    assert not any(tmp_path.iterdir())


def test_a_config_names_what_is_tried(tmp_path: Path) -> None:
    config = tmp_path / "cfg.yaml"
    config.write_text(
        "model: torch.nn.Identity\ndata: {train: builtins.list, batch_size: 4}\noptimizer: torch.optim.SGD\n"
        f"train: {{steps: 1}}\nrun_dir: {tmp_path}/run\n"
    )
    code, findings = doctor(str(config), "cluster.nodes=3", "checkpoint.url=/proc/nowhere")
    (refused,) = findings["storage", "/proc/nowhere"]
    assert (code, refused["level"]) == (1, "problem")
    assert f"at {tmp_path}/run" in findings["machine", "disk"][0]["found"]


def test_every_problem_and_warning_has_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--url", "/proc/nowhere"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("1 problem, ")
    for line, following in itertools.pairwise(lines):
        if line.startswith(("problem", "warn")):
            assert following.startswith("        "), line


def test_tight_limits_are_seen() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_NPROC)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[0][1]))
        resource.setrlimit(resource.RLIMIT_NPROC, (100, before[1][1]))
        found = {finding.name: finding for finding in machine.examine(workers=1000)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before[0])
        resource.setrlimit(resource.RLIMIT_NPROC, before[1])
    assert [found[name].level for name in ("open files", "processes", "cores")] == ["warn"] * 3
    assert "ulimit -n" in found["open files"].advice


def test_a_container_with_little_memory_and_no_shm(tmp_path: Path) -> None:
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{2**30}\n")
    found = {finding.name: finding for finding in machine.examine(workers=1, root=tmp_path)}
    assert found["memory"].found.startswith("1.0 GiB of ")
    assert (found["memory"].level, found["/dev/shm"].level) == ("warn", "problem")


def test_a_python_without_torch_and_dtrain(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = str(tmp_path / "bare/bin/python")
    found = {finding.name: finding for finding in software.examine(python)}
    assert (found["dtrain"].level, found["torch"].level) == ("problem", "problem")
    assert f"{python} -m pip install dtrain" in found["dtrain"].advice
    assert found["python"].level == "ok"


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_a_python_that_is_none(python: str) -> None:
    (found,) = software.examine(python)
    assert (found.name, found.level) == ("python", "problem")


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(python: str) -> dict[str, Any]:
        requires = ["rich>=14", 'obstore>=0.12; extra == "s3"', 'moto[server]>=5; extra == "dev"', "torch>=2.13"]
        return {"requires": requires, "versions": {"rich": "13.9.1"}, "python": "3.10.4", "executable": python,
                "dtrain": "1", "compiler": "", "git": "", "torch": {"version": "", "error": "no"}}  # fmt: skip

    monkeypatch.setattr(software, "_ask", ask)
    found = {finding.name: finding for finding in software.examine("python")}
    assert (found["rich"].level, found["rich"].advice) == ("problem", "pip install 'rich>=14'")
    assert found["python"].level == "problem"
    assert "dtrain[s3]" in found["extra s3"].found
    assert "moto" not in found
    assert "dtrain.launcher.build_horovod" in found["strategy horovod"].found
    assert "pip install" in found["strategy zero1, zero2, zero3"].found
    assert found["strategies"].found == "single, ddp, fsdp"


def test_object_stores_are_tried_for_real() -> None:
    """One that is fit, a bucket that is not there, and a server that is not."""
    with moto() as server, server.environment():
        server.make_bucket("fit")
        assert [finding.level for finding in storage.examine("s3://fit/prefix")] == ["ok"] * 5
        assert "Contents" not in server.client().list_objects_v2(Bucket="fit")
        (missing,) = storage.examine("s3://missing/prefix")
        assert (missing.level, "missing" in missing.found) == ("problem", True)
    gone = {**server.variables(), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    with environment(gone):
        (refused,) = storage.examine("s3://fit/prefix")
    assert (refused.level, "127.0.0.1:9" in refused.found) == ("problem", True)


class _Forgetful(FileStorage):
    """Writes names again that are taken, and deletes nothing."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        if not os.path.exists(f"{self.root}/{key}"):
            super().put_if_absent(key, data)

    def delete(self, *keys: str) -> None:
        pass


def test_a_store_that_breaks_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "open_storage", lambda url, **options: _Forgetful(url, **options))
    problems = [finding.found for finding in storage.examine(str(tmp_path)) if finding.level == "problem"]
    assert problems == ["a name that was taken was written again", "objects can't be deleted"]
