"""The objects of the Kubernetes back end as text: golden, strictly valid for three releases, exact for hostile names,
any field of a pod over them; the entry script's exit codes; and what a start after a stop prepares."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.kubernetes.backend import KubernetesBackend
from dtrain.cluster.kubernetes.entry import ENTRY
from dtrain.cluster.kubernetes.names import object_name
from dtrain.cluster.kubernetes.overlay import overlay
from dtrain.cluster.kubernetes.podstart import join_start
from dtrain.cluster.kubernetes.render import render_job, render_service
from dtrain.cluster.kubernetes.standing import Found, is_lost, judge
from dtrain.cluster.kubernetesconfig import KubernetesConfig, is_on_volume, resolve_kubernetes, volume_source
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.launcher.podchecks import check_pods

GOLDEN = Path(__file__).parent / "assets" / "golden" / "kubernetes"
RELEASES = ("1.35", "1.36", "1.37")
PLAN = JobPlan(
    name="digits", run_dir="/data/runs/digits", job_id="kubernetes-20261122-101530-1a2b", backend="kubernetes", nodes=4,
    procs_per_node=1, gpus_per_node=0, threads_per_proc=0, python="python3", argv=("dtrain", "launch"), cwd="/home/me",
    sys_path=(), env={"A": "1"}, checkpoint_url="/data/runs/digits/checkpoints", workers="warm",
    max_restarts_without_progress=3,
    kubernetes=KubernetesConfig(
        image="registry/dtrain:1", volumes={"/data": "pvc:data"}, user=1000, groups=(1000,), grace_s=120
    ),
)  # fmt: skip
EVERYTHING = KubernetesConfig(
    image="registry/dtrain:1", namespace="ml", memory="64Gi", user=1000, groups=(100, 2000, 2001), secret="keys",
    volumes={"/data": "pvc:data", "/home": "nfs:10.0.0.1:/export/home", "/scratch": "host:/mnt/nvme"},
    service_account="dtrain", image_pull_secrets=("registry",), node_selector={"gpu": "on"}, grace_s=300, keep_s=60,
    labels={"kueue.x-k8s.io/queue-name": "q"},
    pod={
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "other"}}}]}},
        "priorityClassName": "high", "terminationGracePeriodSeconds": None,
        "containers": [{"name": "agent", "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                        "resources": {"limits": {"rdma/hca": "1"}}},
                       {"name": "beside", "image": "registry/beside:1"}],
        "volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "8Gi"}}],
    },
)  # fmt: skip
SHAPES = {
    "cpus": PLAN,
    "everything": replace(
        PLAN, nodes=2, procs_per_node=8, gpus_per_node=8, cpus_per_node=96, secrets=("WANDB_API_KEY",),
        kubernetes=EVERYTHING, setup=("source /opt/env",),
    ),
}  # fmt: skip
HOSTILE = [
    "$$(HOME) $ $$",
    "x; rm -rf ~",
    "Ünï côde 日本",
    "-",
    "",
    "1st",
    "a" * 200,
    "$(touch x)",
    "it's\n- a: b",
    "on",
    "UPPER_case.1",
    "{{x}}",
]


def objects(plan: JobPlan) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KubernetesBackend().render(plan)))


@pytest.mark.parametrize("shape", SHAPES)
def test_golden(shape: str) -> None:
    text = KubernetesBackend().render(SHAPES[shape]).partition("# /data/runs")[0]
    path = GOLDEN / f"{shape}.yaml"
    if os.environ.get("DTRAIN_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_text_and_objects_are_the_same(shape: str) -> None:
    assert objects(SHAPES[shape]) == [render_job(SHAPES[shape]), render_service(SHAPES[shape])]


@pytest.mark.parametrize("release", RELEASES)
def test_three_releases_take_them(release: str) -> None:
    import kubernetes_validate

    for plan in (*SHAPES.values(), replace(PLAN, name=HOSTILE[1], run_dir=HOSTILE[7])):
        for one in (render_job(plan), render_service(plan, "11-22")):
            kubernetes_validate.validate(one, release, strict=True)
    wrong = render_job(replace(PLAN, kubernetes=replace(PLAN.kubernetes, pod={"tolerance": []})))
    with pytest.raises(kubernetes_validate.ValidationError, match="tolerance"):
        kubernetes_validate.validate(wrong, release, strict=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_a_name(name: str) -> None:
    plan = replace(PLAN, name=name, run_dir=f"/data/{name}")
    label = object_name(plan)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
    assert len(f"{label}-99999") <= 63
    assert label.endswith("-20261122-101530-1a2b")
    job, _ = objects(plan)
    assert job["metadata"]["annotations"] == {"dtrain/run": name, "dtrain/run-dir": f"/data/{name}"}
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert expanded(command) == ["bash", "-c", ENTRY.lstrip("\n"), "dtrain", f"/data/{name}", plan.job_id]


def expanded(command: list[str]) -> list[str]:
    """As Kubernetes does it, with a variable for every name: $(NAME) is its value, $$ a dollar, the rest stays."""
    return [re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "VALUE", word) for word in command]


def test_a_secret_is_only_named() -> None:
    job = render_job(SHAPES["everything"])
    env = {one["name"]: one for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY"}}


def test_an_overlay_merges_by_name_and_appends_where_there_is_none() -> None:
    base = {"a": 1, "volumes": [{"name": "x", "v": 1}, {"name": "y"}], "tolerations": [{"key": "k"}], "gone": 1}
    patch = {
        "volumes": [{"name": "x", "w": 2}, {"name": "z"}], "tolerations": [{"key": "k"}], "gone": None,
        "new": {"n": None},
    }  # fmt: skip
    assert overlay(base, patch) == {
        "a": 1, "volumes": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}, {"name": "z"}],
        "tolerations": [{"key": "k"}, {"key": "k"}], "new": {},
    }  # fmt: skip


def test_what_a_config_lacks_is_said_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**asked: Any) -> dict[str, str]:
        cluster = ClusterConfig(backend="kubernetes", kubernetes=KubernetesConfig(**asked))
        return dict(check_pods(cluster, "/data/runs/x", "file:///ckpt/x"))

    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert said().keys() == {
        "cluster.kubernetes.image", "cluster.kubernetes.user", "run_dir", "checkpoint.url",
    }  # fmt: skip
    mounts = [{"name": "agent", "volumeMounts": [{"name": "c", "mountPath": "/ckpt"}]}]
    assert said(image="i", user=0, volumes={"/data": "pvc:d"}, pod={"containers": mounts}) == {}
    assert not is_on_volume(KubernetesConfig(volumes={"/data": "pvc:d"}), "/database/x")
    for wrong in ("data", "pvc:", "pvc:A_b", "nfs:server", "host:rel", "s3:x:/y"):
        with pytest.raises(ValueError, match="expects pvc:CLAIM"):
            volume_source(wrong)


def test_the_grace_follows_the_slowest_save() -> None:
    assert resolve_kubernetes(KubernetesConfig(), 2.0).grace_s == 120
    assert resolve_kubernetes(KubernetesConfig(), 100.0).grace_s == 360
    assert resolve_kubernetes(KubernetesConfig(grace_s=7), 100.0).grace_s == 7


# ---- a pod's first process ----


def run_entry(run: Path, script: str, ended: int | None = None, stop_after: str = "") -> tuple[int, str]:
    control = run / "control" / "job"
    control.mkdir(parents=True, exist_ok=True)
    (control / "token").write_text("x")
    if ended is not None:
        end = json.dumps({"state": "x", "exit_code": ended, "reason": "exit_code: 7"})
        script = f"echo '{end}' >{control}/ended.json; {script}"
    (control / "node.sh").write_text(script)
    environ = {**os.environ, "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "x-3"}
    process = subprocess.Popen(
        ["bash", "-c", ENTRY, "dtrain", str(run), "job"], env=environ, stdout=subprocess.PIPE, text=True
    )
    while stop_after and not (run / stop_after).exists():
        time.sleep(0.01)
    if stop_after:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    ("code", "ended", "expected"),
    [(0, 0, 0), (1, 0, 0), (137, 1, 1), (85, 85, 85), (85, None, 85), (93, None, 93), (1, None, 75), (137, None, 137)],
)
def test_the_exit_code_is_the_runs_or_one_to_be_tried_again(
    code: int, ended: int | None, expected: int, tmp_path: Path
) -> None:
    assert run_entry(tmp_path, f'echo "I am $1"; exit {code}', ended) == (expected, "I am 3\n")
    assert (tmp_path / "logs" / "agent-3.log").read_text() == "I am 3\n"
    if ended not in (None, 85):  # a pod that comes after the end
        assert run_entry(tmp_path, "echo too late") == (ended, "")


def test_the_kubelets_signal_reaches_the_agent(tmp_path: Path) -> None:
    agent = f"trap 'echo saved; exit 85' TERM; touch {tmp_path}/up; while :; do read -t 0.05 -u 5; done 5<> <(:)"
    assert run_entry(tmp_path, agent, stop_after="up") == (85, "saved\n")
    deaf = f"touch {tmp_path}/up2; exec sleep 60"  # one that dies of it has left nothing to save: no fault of its node
    assert run_entry(tmp_path, deaf, stop_after="up2")[0] == 85


def test_a_node_that_is_left_out_stands_by(tmp_path: Path) -> None:
    control = tmp_path / "control" / "job"
    twice = f"echo start; [ -e {tmp_path}/second ] && rm {control}/without-3 && exit 0; touch {tmp_path}/second; exit 1"
    control.mkdir(parents=True)
    (control / "without-3").write_text("slow")
    assert run_entry(tmp_path, twice) == (0, "start\nstart\n")


def test_a_run_directory_that_is_not_mounted_is_said(tmp_path: Path) -> None:
    environ = {**os.environ, "JOB_COMPLETION_INDEX": "0"}
    argv = ["bash", "-c", ENTRY, "dtrain", str(tmp_path / "no"), "job"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 93
    assert "cluster.kubernetes.volumes" in done.stderr


# ---- a start after a stop ----


def test_one_pod_opens_the_next_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    control = run.control("job")
    control.path.mkdir(parents=True)
    assert join_start(run, control) == 0
    for start in (1, 2):
        control.ended.write_text(json.dumps({"state": "stopped", "exit_code": 85}))
        control.node(0).write_text("{}")
        control.without(1).write_text("lost")
        (control.path / "memory.json").write_text(json.dumps({"stop": "stop", "reached": 7, "strikes": 2}))
        with ThreadPoolExecutor(8) as pods:
            assert set(pods.map(lambda _: join_start(run, control), range(8))) == {start}
        assert control.incarnation.read_text() == str(start)
        assert not control.node(0).exists()
        assert control.left_out() == {}
        assert read_json(control.path / "memory.json") == {"stop": None, "reached": 7, "strikes": 0, "suspect": None}
    assert [event["restart"] for event in read_jsonl(run.events)] == [1, 2]
    control.ended.write_text(json.dumps({"state": "stopped", "exit_code": 85}))
    (control.path / "start-0003").touch()  # a pod that died while it opened the start
    assert join_start(run, control, patience_s=0.05) == 3
    control.ended.write_text(json.dumps({"state": "stopped", "exit_code": 85}))
    control.cancel.touch()  # a person does not want it back
    assert join_start(run, control) == 3
    assert control.ended.exists()


# ---- what the API shows ----


def job(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "run-1"}, "spec": {"completions": 2, **status.pop("spec", {})}, "status": status}


def pod(index: int, phase: str, *, conditions: Any = (), container: Any = None, deleted: str = "") -> dict[str, Any]:
    statuses = [] if container is None else [{"name": "agent", "state": container}]
    meta = {"name": f"run-1-{index}", "annotations": {"batch.kubernetes.io/job-completion-index": str(index)}}
    if deleted:
        meta["deletionTimestamp"] = deleted
    return {"metadata": meta, "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": statuses}}


UNSCHEDULED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
               "message": "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."}  # fmt: skip
FAILED = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "Container agent failed with 93"}
QUOTA = {"involvedObject": {"name": "run-1"}, "message": 'pods "run-1-0" is forbidden: exceeded quota: small'}
ENDED_93 = {"terminated": {"exitCode": 93, "message": "a\nrun_dir: /x is not there\n", "finishedAt": "2026"}}
PULL = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}}
CASES = [
    (Found(job=None, underway=True), "alive", "is being submitted"),
    (Found(job=None, was_there=True), "gone", "its Job was deleted"),
    (Found(job=None, was_there=True, pods=[pod(0, "Running")]), "alive", "its pods are ending"),
    (Found(job=job(), pods=[pod(0, "Running"), pod(1, "Running")]), "alive", ""),
    (Found(job=job(spec={"suspend": True})), "alive", "suspended"),
    (Found(job=job(), pods=[pod(0, "Running"), pod(1, "Pending", conditions=[UNSCHEDULED])]), "alive",
     "pod run-1-1: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu."),
    (Found(job=job(), pods=[pod(0, "Pending", container=PULL), pod(1, "Pending", container=PULL)]), "alive",
     '2 of 2 pods wait: pod run-1-0: ImagePullBackOff: Back-off pulling image "x"'),
    (Found(job=job(), events=[QUOTA]), "alive", "exceeded quota: small"),
    (Found(job=job(conditions=[FAILED]), pods=[pod(0, "Failed", container=ENDED_93)]), "gone",
     "pod run-1-0 ended with exit code 93: run_dir: /x is not there"),
    (Found(job=job(conditions=[FAILED])), "gone", "its Job has failed: Container agent failed with 93"),
    (Found(job=job(conditions=[FAILED]), pods=[pod(0, "Running")]), "alive", "ending"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "liveness", "words"), CASES)
def test_what_the_cluster_shows_in_words(found: Found, liveness: str, words: str) -> None:
    standing = judge(found)
    assert standing.liveness == liveness
    assert words in standing.words
    assert words or not standing.words


def test_a_pod_is_lost_when_its_machine_is_and_not_while_it_saves() -> None:
    at = "2026-11-22T10:00:00Z"
    now = 1_795_341_600.0
    tainted = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    ready = {"type": "Ready", "status": "True"}
    saving = pod(0, "Running", conditions=[tainted, ready], deleted=at)
    dead = pod(0, "Running", conditions=[tainted, {**ready, "status": "False"}], deleted=at)
    assert not is_lost(saving, now, silent=True)
    assert is_lost(dead, now, silent=True)
    assert not is_lost(dead, now, silent=False)
    assert is_lost(saving, now + 60, silent=False)
    assert not is_lost(pod(0, "Failed", deleted=at), now + 60, silent=True)
    assert not is_lost(pod(0, "Running"), now + 60, silent=True)
