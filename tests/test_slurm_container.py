"""Images for the agents: the words for pyxis and apptainer as their manuals have them, and a run whose apptainer is a
stand-in. Neither runs here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster

from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.slurmconfig import ContainerConfig
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import make_plan
from dtrain.launcher.submit import gather_code
from dtrain.launcher.targetcheck import look_at_targets
from dtrain.slurm.container import Wrapping, check_container, mounted, python_folders, wrap
from dtrain.slurm.steps import step_argv

RUN = "/work/ada/runs/a run"


def a_plan(container: ContainerConfig | None, gpus: int = 0, checkpoints: str = f"file://{RUN}/checkpoints") -> JobPlan:
    return JobPlan(
        name="run", run_dir=RUN, job_id="slurm-1", backend="slurm", nodes=2, procs_per_node=1, gpus_per_node=gpus,
        threads_per_proc=0, python="/opt/python", argv=(), cwd="/home/ada/x", sys_path=("/home/ada/x/y", "/home/ada/z"),
        env={}, checkpoint_url=checkpoints, workers="warm", max_restarts_without_progress=3, container=container,
    )  # fmt: skip


def test_pyxis() -> None:
    container = ContainerConfig(image="nvcr.io#nvidia/pytorch:25.01-py3", runtime="pyxis", mounts=("/data:/data:ro",))
    argv = step_argv(a_plan(container, gpus=4), ["n1", "n2"], 8)
    own = "/home/ada/z:/home/ada/z,/home/ada/x:/home/ada/x"
    mounts = f"/data:/data:ro,{own},{RUN}:{RUN}"
    assert argv[-4:-2] == ("--container-image=nvcr.io#nvidia/pytorch:25.01-py3", argv[-3])
    assert sorted(argv[-3].removeprefix("--container-mounts=").split(",")) == sorted(mounts.split(","))
    assert argv[-2:] == ("bash", f"{RUN}/control/slurm-1/node.sh")


def test_apptainer() -> None:
    container = ContainerConfig(image="/images/a b.sif", runtime="apptainer")
    words = wrap(a_plan(container, gpus=4, checkpoints="/ckpt"), ["/env"])
    assert words.srun == ()
    assert words.before[:4] == ("apptainer", "exec", "--nv", "--bind")
    assert set(words.before[4].split(",")) == {
        f"{folder}:{folder}" for folder in ("/env", "/ckpt", "/home/ada/x", "/home/ada/z", RUN)
    }
    assert words.before[5:] == ("/images/a b.sif",)
    assert "--nv" not in wrap(a_plan(container), []).before
    argv = step_argv(a_plan(container), ["n1"], 8, ranks=[1], overlap=True)
    assert argv[argv.index("apptainer") - 1].startswith("--")
    assert argv[-4:] == ("/images/a b.sif", "bash", f"{RUN}/control/slurm-1/node.sh", "1")


def test_without_a_container_nothing_is_added() -> None:
    assert wrap(a_plan(None), ["/env"]) == Wrapping()


def test_folders_within_others_are_left_out() -> None:
    assert set(mounted(a_plan(None, checkpoints="s3://bucket/x"), [])) == {"/home/ada/x", "/home/ada/z", RUN}
    assert set(mounted(a_plan(None), ["/home/ada"])) == {"/home/ada", RUN}


def test_this_python_is_brought_along_and_the_images_own_is_not() -> None:
    folders = python_folders(sys.executable)
    assert sys.prefix in folders
    assert any((Path(folder) / "slurm" / "job.sbatch").exists() for folder in folders)
    assert not {"/", "/usr", "/usr/local"} & set(folders)
    assert python_folders("/opt/python") == ()


def test_what_a_container_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    container = ContainerConfig(image="a.sif", runtime="apptainer")
    cluster = ClusterConfig(backend="slurm", container=container, python="/opt/python")
    assert list(check_container(cluster, "/runs/a", "s3://b,c/x")) == []
    assert [key for key, _ in check_container(cluster, "/runs/a,b", "file:///c:d")] == ["run_dir", "checkpoint.url"]
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    ((key, message),) = check_container(ClusterConfig(backend="slurm", container=container), "/r", "/c")
    assert key == "cluster.python"
    assert "needs this host's /usr" in message


def test_targets_in_an_image_are_not_looked_at_from_here(tmp_path: Path) -> None:
    """Where the image has a Python of its own, whose packages nobody knows here, the code is used as it lies."""
    path = tmp_path / "cfg.yaml"
    path.write_text(
        "model: {_target_: in_the_image.Model}\n"
        "loss: in_the_image.loss\n"
        "optimizer: torch.optim.SGD\n"
        "train: {steps: 1}\n"
        "data: {train: in_the_image.Data, batch_size: 1}\n"
        "cluster:\n"
        "  {backend: slurm, python: /opt/python, container: {image: a.sif, runtime: apptainer}, setup: ['false']}\n"
    )
    config = load_config(path)
    plan = make_plan(config, job_id="slurm-1", argv=(), cwd=str(tmp_path))
    assert look_at_targets(config, plan.python, plan.sys_path).problems == []
    assert gather_code(config, plan, ()) is None


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_whose_agents_are_started_through_apptainer(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `apptainer` that notes its words and runs what stands behind the image."""
    folder = slurm.root / "boxed run"
    (folder / "bin").mkdir(parents=True)
    apptainer = folder / "bin" / "apptainer"
    apptainer.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>"{folder}/words"\nexec "${{@:5}}"\n')
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    (folder / "hello.py").write_text("import os\nprint('hello', os.environ['RANK'], os.environ['FROM_SETUP'])\n")
    (folder / "cfg.yaml").write_text(
        "script: hello.py\n"
        f"run_dir: {folder}/run\n"
        "cluster:\n"
        f"  {{backend: slurm, nodes: 2, python: {sys.executable}, setup: [export FROM_SETUP=yes]}}\n"
    )
    (folder / "site.yaml").write_text(
        "cluster: {container: {image: /i.sif, runtime: apptainer, mounts: ['/data:/d']}}\n"
    )
    monkeypatch.setenv("DTRAIN_SITE", str(folder / "site.yaml"))
    monkeypatch.chdir(folder)
    try:
        ran = slurm.run(sys.executable, "-P", "-m", "dtrain.launcher.cli", "launch", "cfg.yaml", timeout_s=110)
        assert "done" in ran.stdout
        logs = "".join(path.read_text() for path in (folder / "run" / "logs").glob("a*/node-*.log"))
        assert sorted(line[line.index("hello") :] for line in logs.splitlines() if "hello" in line) == [
            "hello 0 yes",
            "hello 1 yes",
        ]
        words = (folder / "words").read_text().splitlines()
        assert words[:2] == ["exec", "--bind"]
        assert words[2].startswith("/data:/d,")
        assert f"{folder}:{folder}" in words[2].split(",")
        assert words[3:5] == ["/i.sif", "bash"]
    finally:
        shutil.rmtree(folder)
