"""The Kubernetes back end against an API server: a submission whose answers are lost, whose client dies, that is
refused; words for what waits; pods of a dead machine; ends that leave nothing; with the documented rights and no other.
Its pods only sleep: whole runs are test_kubernetes.py's."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes import backend as backends
from dtrain.cluster.kubernetes import client as clients
from dtrain.cluster.kubernetes import submission
from dtrain.cluster.kubernetes.backend import KubernetesBackend
from dtrain.cluster.kubernetes.client import KubernetesUnreachable, connect, find_place
from dtrain.cluster.kubernetes.names import object_name
from dtrain.cluster.kubernetes.rights import QUOTAS, RIGHTS
from dtrain.cluster.kubernetesconfig import KubernetesConfig
from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.launcher.doctor import kubernetes as doctor

if TYPE_CHECKING:
    from kubeserver import KubeServer

pytestmark = pytest.mark.slow
BACKEND = KubernetesBackend()
DEAD = {"pid": 2**22 + 1, "started": 1, "boot": "x", "host": socket.gethostname()}


@pytest.fixture
def plan(kubernetes: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobPlan]:
    """A job that is recorded, of two nodes that sleep. It is killed at the end."""
    from kubeserver_access import Rule

    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    monkeypatch.setattr(clients, "_PATIENCE_S", 3.0)
    kubernetes.allow([Rule(groups=(r.group,), resources=(r.resource,), verbs=r.verbs) for r in (*RIGHTS, QUOTAS)])
    connect.cache_clear()
    made = JobPlan(
        name="x; rm -rf ~", run_dir=str(tmp_path / "run $(x)"), job_id="kubernetes-20261122-101530-1a2b", nodes=2,
        backend="kubernetes", procs_per_node=1, gpus_per_node=0, threads_per_proc=1, python="python3",
        argv=("dtrain", "launch"), cwd="/", sys_path=(), env={}, checkpoint_url=str(tmp_path / "ckpt"), workers="warm",
        max_restarts_without_progress=3, setup=("exec sleep 1000",),
        kubernetes=KubernetesConfig(
            image="dtrain:1", volumes={str(tmp_path): f"host:{tmp_path}"}, user=0, groups=(0,), grace_s=20, keep_s=600
        ),
    )  # fmt: skip
    control = RunDir(made.run_dir).control(made.job_id)
    control.path.mkdir(parents=True, mode=0o700)
    control.token.write_text("0" * 64)
    RunDir(made.run_dir).job.write_text(json.dumps(asdict(made)))
    yield made
    kubernetes.faults.clear()
    BACKEND.kill(made)
    connect.cache_clear()
    kubernetes.wait(lambda: not left(kubernetes), words=lambda: str(left(kubernetes)))


def left(kubernetes: KubeServer) -> list[str]:
    kinds = ("jobs", "pods", "services")
    return [f"{kind} {one['metadata']['name']}" for kind in kinds for one in kubernetes.store.objects(kind)]


def phases(kubernetes: KubeServer) -> list[str]:
    return [pod["status"]["phase"] for pod in kubernetes.pods()]


def conditions(of: dict[str, Any]) -> set[str]:
    return {one["type"] for one in of.get("status", {}).get("conditions", ())}


def told(plan: JobPlan) -> tuple[str, str]:
    return BACKEND.state(plan), BACKEND.reason(plan)


def test_lost_answers_and_busy_servers_make_one_job(kubernetes: KubeServer, plan: JobPlan) -> None:
    faults = kubernetes.faults
    faults.lose_answer("create", "jobs")
    faults.answer(429, "create", "services", retry_after_s=1)
    faults.cut("create", "services", skip=1)
    faults.lose_answer("create", "services", skip=2)
    began = time.monotonic()
    BACKEND.submit(plan)
    assert time.monotonic() - began > 1.0  # Retry-After
    name = object_name(plan)
    assert [one["metadata"]["name"] for one in kubernetes.store.objects("jobs")] == [name]
    (service,) = kubernetes.store.objects("services")
    assert service["metadata"]["ownerReferences"][0]["uid"] == kubernetes.job(name)["metadata"]["uid"]
    kubernetes.wait(lambda: phases(kubernetes) == ["Running", "Running"])
    assert told(plan) == ("alive", "")
    assert BACKEND.called(plan) == f"Kubernetes Job default/{name}"
    kubernetes.wait((Path(plan.run_dir) / "logs" / "agent-1.log").exists)
    connect(find_place(None, None)).delete_job(name)
    kubernetes.wait(lambda: not left(kubernetes))
    assert told(plan) == ("gone", "its Job was deleted")


class Died(BaseException):
    """The client is gone, at this very point."""


def test_a_client_that_dies_anywhere_leaves_one_job_or_none(
    kubernetes: KubeServer, plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each of its calls and records, and where the server's answers are lost: the next look settles
    it."""
    steps = count()
    die_at = 0

    def stepped(work: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            for part in (lambda: None, lambda: work(*args, **options)):
                found = part()
                if next(steps) == die_at:
                    raise Died
            return found

        return step

    monkeypatch.setattr(clients, "_PAUSE_S", (0.01,))
    monkeypatch.setattr(submission, "_UNSENT_S", 0.0)
    unable = replace(plan.kubernetes, image="missing:1")  # so that its pods cost nothing
    faults: list[tuple[str, str, str]] = [
        ("", "", ""),
        ("lose_answer", "create", "jobs"),
        ("cut", "create", "services"),
    ]
    outcomes = set()
    for number, (at, (fault, verb, resource)) in enumerate(product(range(9), faults)):
        one = replace(plan, job_id=f"kubernetes-{number}", kubernetes=unable)
        control = RunDir(one.run_dir).control(one.job_id)
        control.path.mkdir(mode=0o700)
        if fault:
            getattr(kubernetes.faults, fault)(verb, resource)
        steps, die_at = count(), at
        with monkeypatch.context() as dying:
            for name in ("write_once", "write_atomic"):
                dying.setattr(submission, name, stepped(getattr(submission, name)))
            dying.setattr(clients.Client, "_raw", stepped(clients.Client._raw))
            with contextlib.suppress(Died):
                BACKEND.submit(one)
        if (record := read_json(control.path / "kubernetes.json")) is not None:
            write_atomic(control.path / "kubernetes.json", json.dumps({**record, "by": DEAD}))
        kubernetes.faults.clear()
        states = [BACKEND.state(one) for _ in range(2)]
        outcomes.add(states[-1])
        expected = [object_name(one)] if states[-1] == "alive" else []
        assert [job["metadata"]["name"] for job in kubernetes.store.objects("jobs")] == expected, (at, fault, states)
        assert [service["metadata"]["name"] for service in kubernetes.store.objects("services")] == expected, (
            at,
            fault,
        )
        assert control.ended.exists() == (not expected)
        BACKEND.kill(one)
        kubernetes.wait(lambda: not left(kubernetes))
    assert outcomes == {"alive", "gone"}


def test_a_client_that_dies_between_the_two_creates(kubernetes: KubeServer, plan: JobPlan) -> None:
    place = find_place(None, None)
    record = {**asdict(place), "by": {"pid": 2**22 + 1, "started": 1, "boot": "x", "host": "elsewhere"}}
    control = RunDir(plan.run_dir).control(plan.job_id)
    write_atomic(control.script, "sleep 1000", 0o600)
    write_atomic(control.path / "kubernetes.json", json.dumps(record))
    assert BACKEND.state(plan) == "alive"  # somewhere it may still be at it
    job = submission.create_job(plan, connect(place))
    assert submission.create_job(plan, connect(place))["metadata"]["uid"] == job["metadata"]["uid"]
    assert not kubernetes.store.objects("services")
    assert BACKEND.state(plan) == "alive"
    assert len(kubernetes.store.objects("services")) == 1
    with pytest.raises(UsageError, match="belongs to another run"):
        submission.create_job(replace(plan, run_dir="/other"), connect(place))


def test_a_job_that_never_came_and_comes_after_all(kubernetes: KubeServer, plan: JobPlan) -> None:
    control = RunDir(plan.run_dir).control(plan.job_id)
    write_atomic(control.script, "sleep 1000", 0o600)
    write_atomic(control.path / "kubernetes.json", json.dumps({**asdict(find_place(None, None)), "by": DEAD}))
    assert BACKEND.state(plan) == "gone"
    assert "never submitted" in (read_json(control.ended) or {})["reason"]
    submission.create_job(plan, connect(find_place(None, None)))  # hours later: its pods find that it is over
    kubernetes.wait(
        lambda: any(c["type"] == "Failed" for c in kubernetes.job(object_name(plan))["status"].get("conditions", ()))
    )
    assert BACKEND.state(plan) == "gone"


def test_why_pods_wait(kubernetes: KubeServer, plan: JobPlan) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"gpus_per_node": 3}, "Insufficient nvidia.com/gpu"),
        ({"kubernetes": replace(plan.kubernetes, image="missing:1")}, "pull"),
    ]
    for number, (change, words) in enumerate(cases):
        one = replace(plan, **change, job_id=f"kubernetes-{number}")
        RunDir(one.run_dir).control(one.job_id).path.mkdir(parents=True)
        BACKEND.submit(one)
        kubernetes.wait(lambda one=one, words=words: words in told(one)[1], words=lambda one=one: str(told(one)))  # type: ignore[misc]
        BACKEND.stop(one)  # nothing has begun: it goes
        kubernetes.wait(lambda one=one: BACKEND.state(one) == "gone")  # type: ignore[misc]
    kubernetes.add_quota("small", {"pods": "1"})
    BACKEND.submit(plan)
    kubernetes.wait(lambda: "exceeded quota: small" in told(plan)[1], words=lambda: str(told(plan)))


def test_a_pod_that_dies_without_a_run_directory_tells_why(kubernetes: KubeServer, plan: JobPlan) -> None:
    BACKEND.submit(replace(plan, kubernetes=replace(plan.kubernetes, volumes={})))
    kubernetes.wait(lambda: BACKEND.state(plan) == "gone")
    assert "cluster.kubernetes.volumes mounts it" in BACKEND.reason(plan)


def test_a_server_that_does_not_answer_is_no_end(kubernetes: KubeServer, plan: JobPlan) -> None:
    BACKEND.submit(plan)
    kubernetes.faults.go_down()
    state, words = told(plan)
    assert state == "unknown"
    assert "the Kubernetes API does not answer" in words
    status = RunDir(plan.run_dir).control(plan.job_id).status
    status.write_text(json.dumps({"state": "running", "seen_at": time.time() + 5, "workers": []}))
    assert BACKEND.state(plan) == "alive"
    with pytest.raises(KubernetesUnreachable):
        BACKEND.kill(plan)
    with pytest.raises(UsageError, match="Nothing was submitted"):
        BACKEND.check(plan)


def test_what_the_cluster_would_refuse_is_said_before(kubernetes: KubeServer, plan: JobPlan) -> None:
    BACKEND.check(plan)
    wrong = replace(plan, kubernetes=replace(plan.kubernetes, pod={"tolerance": []}))
    with pytest.raises(UsageError, match="tolerance"):
        BACKEND.check(wrong)
    nobody = replace(plan, kubernetes=replace(plan.kubernetes, service_account="nobody"))
    with pytest.raises(UsageError, match=r"its pods: .*nobody"):
        BACKEND.check(nobody)
    kubernetes.add_quota("none", {"pods": "0"})
    BACKEND.check(plan)  # which is waited for
    kubernetes.allow([])
    with pytest.raises(UsageError, match="cannot create"):
        BACKEND.check(plan)
    assert not left(kubernetes)


def test_the_pod_of_a_dead_machine_is_replaced(kubernetes: KubeServer, plan: JobPlan) -> None:
    BACKEND.submit(plan)
    kubernetes.wait(lambda: phases(kubernetes) == ["Running", "Running"])
    control = RunDir(plan.run_dir).control(plan.job_id)
    lost = kubernetes.pods()[1]
    index = int(lost["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])
    kubernetes.kill_node(lost["spec"]["nodeName"])

    def look() -> bool:
        workers = [{"node": 1 - index}]  # as the coordinator tells it: the other one is not heard of
        control.status.write_text(json.dumps({"state": "running", "seen_at": time.time(), "workers": workers}))
        BACKEND.state(plan)
        here = {pod["metadata"]["uid"]: pod for pod in kubernetes.pods()}
        return lost["metadata"]["uid"] not in here and phases(kubernetes) == ["Running", "Running"]

    kubernetes.wait(look)
    assert lost["spec"]["nodeName"] not in {pod["spec"]["nodeName"] for pod in kubernetes.pods()}


def test_a_lost_node_is_waited_for_before_the_run_goes_on_without(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = RunDir(plan.run_dir).control(plan.job_id)

    def follows(*, enough: bool = True, alive: bool = False) -> str:
        return BACKEND.lose_node(plan, 1, "lost", enough=enough, alive=alive).follows

    assert follows() == "wait"  # it never came
    control.node(1).write_text('{"pid": 1}')
    assert follows() == "wait"
    monkeypatch.setattr(backends, "_REPLACED_S", 0.0)
    assert (follows(), follows(enough=False)) == ("rest", "wait")
    assert (follows(alive=True), follows(alive=True, enough=False)) == ("rest", "nothing")


def test_doctor_asks_for_each_right_and_tries_a_job(kubernetes: KubeServer, plan: JobPlan) -> None:
    kubernetes.add_quota("small", {"pods": "10"})
    findings = list(doctor.examine(plan))
    assert {one.level for one in findings} == {"ok"}, findings
    assert any("pods 0 of 10" in one.found for one in findings)
    assert findings[-1].found == "the Job, its pods and the Service would be taken"
    kubernetes.allow([])
    findings = list(doctor.examine(plan))
    assert [one.level for one in findings if one.name.startswith("right")] == ["problem"] * 3 + ["warn"] * 4
    assert findings[-1].level == "problem"
    assert not left(kubernetes)
