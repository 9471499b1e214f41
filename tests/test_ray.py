"""The ray back end on a real cluster of four nodes: the same curve as on this machine whatever is lost, what is said
before and while a job waits, and that nothing of it stays in Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import rayschedules
from faultproxy import FaultProxy, Schedule
from launched import CONFIG, DTRAIN, Launched
from raycluster import MARK, NODES, RayCluster
from sessions import processes_of

from dtrain.cluster import exits
from dtrain.cluster.answers import LastAnswers
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ray import backend, driver
from dtrain.cluster.ray.backend import RayBackend
from dtrain.cluster.ray.files import RayFiles, RayNode, Standing
from dtrain.cluster.ray.jobs import Jobs
from dtrain.cluster.ray.node import node_environ, why_not
from dtrain.cluster.ray.placing import assign_ranks
from dtrain.cluster.ray.resources import bundle, describe, fits
from dtrain.cluster.ray.sealed import new_key, seal, unseal
from dtrain.cluster.rayconfig import RayConfig
from dtrain.cluster.rundir import RunDir, read_json, write_atomic

PLAN = JobPlan(
    name="x; rm -rf ~", run_dir="/runs/x; rm -rf ~", job_id="ray-1", backend="ray", nodes=4, procs_per_node=2,
    gpus_per_node=1, threads_per_proc=3, python="/env/bin/python", argv=("dtrain", "launch"), cwd="/home/a b",
    sys_path=(), env={}, checkpoint_url="/runs/x/checkpoints", workers="warm", max_restarts_without_progress=3,
    ray=RayConfig(resources={"disk": 2}, labels={"zone": "a"}),
)  # fmt: skip
CANARY = "canary-4711-value"


def test_a_dry_run_is_exact_and_quoted() -> None:
    text = RayBackend().render(PLAN)
    assert text == RayBackend().render(PLAN)
    request, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert request["submission_id"] == "ray-1"
    assert "--run-dir '/runs/x; rm -rf ~' --job-id ray-1 --key KEY" in request["entrypoint"]
    assert request["runtime_env"] == {}
    assert bundle(PLAN) == {"CPU": 2, "GPU": 1, "disk": 2}
    assert describe(PLAN) == "4 nodes with 2 CPU, 1 GPU, 2 disk and zone=a"
    has = {"CPU": 8.0, "GPU": 1.0, "disk": 2.0}
    assert fits(PLAN, has, {"zone": "a"})
    assert not fits(PLAN, has, {"zone": "b"})
    assert not fits(PLAN, {**has, "disk": 1.0}, {"zone": "a"})


def test_a_node_keeps_its_rank_where_ray_gives_it_again() -> None:
    nodes = {index: RayNode(id=f"id{index}", address=f"10.0.0.{10 - index}") for index in range(3)}  # .10, .9, .8
    assert assign_ranks(nodes, {}) == [2, 1, 0]
    before = {0: RayNode(id="id0", address="10.0.0.10"), 1: RayNode(id="gone", address="10.0.0.99")}
    assert assign_ranks(nodes, before) == [0, 2, 1]
    again = {1: RayNode(id="another", address="10.0.0.8")}  # the same machine, Ray started anew
    assert assign_ranks(nodes, again) == [1, 2, 0]


def test_only_the_key_opens_what_was_sealed() -> None:
    key, values = new_key(), {"TOKEN": CANARY, "ODD": "a\n'b' \"c\" \udcff"}
    sealed = seal(values, key)
    assert unseal(sealed, key) == values
    assert CANARY.encode() not in sealed
    assert seal(values, key) != sealed
    for wrong, opener in ((sealed, new_key()), (sealed[:-1] + bytes([sealed[-1] ^ 1]), key), (b"", key)):
        with pytest.raises(DtrainError, match="not sealed with the key"):
            unseal(wrong, opener)


def test_an_agent_takes_itself_for_no_process_of_rays() -> None:
    own = {"RAY_JOB_ID": "1", "RAY_ADDRESS": "h:1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": "/bin",
           "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace"}  # fmt: skip
    mine = {"HF_HOME": "/hf", "PATH": "/mine", "RAY_ADDRESS": "other", "CUDA_VISIBLE_DEVICES": "7"}
    cpu = node_environ(own, {"HF_HOME": "/hf"}, 0, "10.0.0.1")
    assert cpu == {"HF_HOME": "/hf", "PATH": "/bin", "DTRAIN_RAY_NODE_ADDRESS": "10.0.0.1"}
    gpu = node_environ({**own, "CUDA_VISIBLE_DEVICES": "2,3"}, mine, 2, "10.0.0.1")
    assert gpu == {"HF_HOME": "/hf", "PATH": "/mine", "CUDA_VISIBLE_DEVICES": "2,3",
                   "DTRAIN_RAY_NODE_ADDRESS": "10.0.0.1"}  # fmt: skip
    assert RayBackend().worker_environ(gpu) == {"HF_HOME": "/hf", "PATH": "/mine", "CUDA_VISIBLE_DEVICES": "2,3"}


@pytest.mark.parametrize(
    ("wrong", "key", "words"),
    [
        ({"address": "htp://head:8265"}, "address", "htp://"),
        ({"address": "head"}, "address", "no port"),
        ({"address": "http://"}, "address", "no address"),
        ({"resources": {"GPU": 1}}, "resources.GPU", "cluster.gpus_per_node"),
        ({"resources": {"TPU": 0}}, "resources.TPU", "not above 0"),
        ({"resources": {"TPU": 1.5}}, "resources.TPU", "whole numbers"),
    ],
)
def test_a_wrong_value_is_found_without_a_cluster(wrong: dict[str, object], key: str, words: str) -> None:
    (found,) = RayConfig(**wrong).problems()  # type: ignore[arg-type]
    assert found[0] == f"cluster.ray.{key}"
    assert words in found[1]
    assert not list(RayConfig(address="head:6379", resources={"TPU": 4, "half": 0.5}).problems())


def _recorded(run_dir: Path, **changes: object) -> JobPlan:
    plan = dataclasses.replace(PLAN, run_dir=str(run_dir), **{"nodes": 2, **changes})  # type: ignore[arg-type]
    control = RunDir(run_dir).control(plan.job_id)
    control.path.mkdir(parents=True)
    control.token.write_text("0" * 64)
    write_atomic(RunDir(run_dir).job, json.dumps(plan.to_json()))
    return plan


def test_who_can_not_take_part_says_so_and_who_comes_late_begins_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"does not see {tmp_path}/none" in why_not(f"{tmp_path}/none", "ray-1")
    assert driver.main(["--run-dir", f"{tmp_path}/none", "--job-id", "ray-1", "--key", "00"]) == exits.NEVER_RETRY
    assert "that all of Ray's nodes share" in capsys.readouterr().err
    plan = _recorded(tmp_path / "old", version="0.0.1")
    assert "was submitted with 0.0.1" in why_not(plan.run_dir, plan.job_id)
    plan = _recorded(tmp_path / "over")
    assert why_not(plan.run_dir, plan.job_id) == ""
    RayFiles(plan).control.ended.write_text(json.dumps({"exit_code": 3, "state": "cancelled", "reason": ""}))
    late = ["--run-dir", plan.run_dir, "--job-id", plan.job_id, "--key", "00"]
    assert driver.main(late) == exits.CANCELLED  # without Ray, of which there is none here


def test_a_lost_node_is_waited_for_only_while_ray_can_replace_it(tmp_path: Path) -> None:
    plan = _recorded(tmp_path / "run")
    files = RayFiles(plan)
    files.put_standing(Standing(phase="running", lost={"1": "Ray has no other node with 2 CPU"}))
    assert RayBackend().start_node(plan, 1) is False
    loss = RayBackend().lose_node(plan, 1, "it is gone", enough=True, alive=False)
    assert (loss.follows, loss.note) == ("rest", ": Ray has no other node with 2 CPU")
    assert RayBackend().state(plan) == "alive"  # the keeper has just said something


@pytest.fixture
def launched(ray: RayCluster, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """launched(name) -> Launched; local=True: on the local back end. What still goes on is cancelled."""
    made: list[Launched] = []

    def make(name: str, *, local: bool = False, **cluster: object) -> Launched:
        config = tmp_path / f"{name}.json"
        engine = {} if local else {"backend": "ray", "ray": {"address": ray.url}}
        config.write_text(json.dumps({**CONFIG, "cluster": {**CONFIG["cluster"], **engine, **cluster}}))
        made.append(Launched(run=RunDir(tmp_path / name), config=config))
        return made[-1]

    yield make
    for one in made:
        if one.run.job.exists() and not one.control.ended.exists():
            subprocess.run([DTRAIN, "cancel", one.run.path], stdout=subprocess.DEVNULL, timeout=100, check=False)


def _plan_of(job: Launched) -> JobPlan:
    record = read_json(job.run.job)
    assert record is not None
    return JobPlan.from_json(record)


def _node_of(pid: int) -> int:
    """The test cluster's node that a process was started on."""
    return int(psutil.Process(pid).environ()[MARK].rpartition("-")[2])


def _kill(words: str, ray: RayCluster) -> int:
    """Kills this cluster's processes with these words on their command line; how many there were."""
    found = 0
    for pid in [pid for node in range(NODES) for pid in ray._pids(node)]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if words in " ".join(process.cmdline()):
                process.kill()
                found += 1
    return found


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_same_curve_whatever_is_lost(launched: Callable[..., Launched], ray: RayCluster) -> None:
    """A worker, then keeper and driver, then a node, which another of Ray's replaces: bit for bit a local run's."""
    whole, hurt = launched("whole", local=True), launched("hurt")
    assert whole.finish() == 0, whole.said
    process = hurt.launch()
    hurt.until_step(6)
    victim = next(node for node in (0, 1) if _node_of(hurt.agent(node)) > 0)  # the head has the only Jobs API
    other = hurt.agent(1 - victim)
    workers = [process for process in processes_of({other}) if process.pid != other]
    os.kill(max(workers, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    hurt.until(lambda: len(hurt.events("attempt_started")) == 2, "attempt 2 after the loss of a worker")

    hurt.until_step(12)
    job_id = _plan_of(hurt).job_id
    hurt.until(lambda: RayFiles(_plan_of(hurt)).standing() is not None, "a keeper, for which the nodes do not wait")
    assert _kill(f"dtrain.cluster.ray.driver --run-dir {hurt.run.path} ", ray) >= 1
    assert _kill("ray::KeeperActor", ray) == 1
    hurt.until_step(16)
    ray.kill_node(_node_of(hurt.agent(victim)))
    hurt.until(lambda: len(hurt.events("attempt_started")) == 3, "attempt 3 after the loss of a node")
    assert ray.get(f"/api/jobs/{job_id}")["status"] == "FAILED"  # as far as Ray's Jobs API knows
    assert process.wait(200) == 0, hurt.said
    assert [event["nodes"] for event in hurt.events("attempt_started")] == [2, 2, 2]
    assert hurt.curve() == whole.curve()
    ray.wait_for(lambda: not ray.kept(), "Ray without anything of the job")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_detached_then_asked_submitted_again_and_cancelled(
    launched: Callable[..., Launched], ray: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", CANARY)
    job = launched("long")
    assert job.finish("--detach", "cluster.secrets=[TOKEN]", "train.steps=100000") == 0, job.said
    job.until_step(1)
    plan = _plan_of(job)

    def standing() -> tuple[str, int]:
        status = json.loads(subprocess.check_output([DTRAIN, "status", "--json", job.run.path]))
        return status["state"], status["world_size"]

    job.until(lambda: standing() == ("running", 2), "a status, written once a second, that tells of it")
    worker = max(processes_of({job.agent(1)}), key=lambda process: process.create_time())
    environ = worker.environ()
    assert environ["TOKEN"] == CANARY
    assert [name for name in environ if name.startswith("RAY_") or name == "CUDA_VISIBLE_DEVICES"] == []

    RayBackend().submit(plan)
    assert [found["submission_id"] for found in ray.get("/api/jobs/")].count(plan.job_id) == 1

    said = json.dumps([ray.get("/api/jobs/"), ray.get("/api/v0/actors?detail=1&limit=1000")]).encode()
    logs = [path.read_bytes() for path in (ray.root / "t" / "session_latest" / "logs").rglob("*") if path.is_file()]
    files = [path.read_bytes() for path in job.run.path.rglob("*") if path.is_file()]
    assert plan.job_id.encode() in said
    assert logs
    assert not any(CANARY.encode() in text for text in (said, *logs, *files))

    done = subprocess.run([DTRAIN, "cancel", job.run.path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done
    assert job.events("ended")[-1]["state"] == "cancelled"
    ray.wait_for(lambda: not ray.kept(), "Ray without anything of the job")
    assert not list(RayFiles(plan).control.path.glob("*.sealed"))


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_job_waits_for_nodes_and_says_for_which(ray: RayCluster, tmp_path: Path) -> None:
    """Its stop is a person's cancel: it ends before it has begun."""
    shape = {"nodes": 5, "cpus_per_node": 1, "gpus_per_node": 0}
    plan = _recorded(
        tmp_path / "waits", job_id="ray-waits", **shape, python=sys.executable, ray=RayConfig(address=ray.url)
    )
    with pytest.raises(UsageError, match="no Ray cluster answers there"):
        RayBackend().check(dataclasses.replace(plan, ray=RayConfig(address="http://127.0.0.1:9")))
    RayBackend().submit(plan)
    words = "waiting for 5 nodes with 1 CPU; the cluster has 4"
    ray.wait_for(lambda: RayBackend().reason(plan) == words, f"reason {words!r}")
    write_atomic(RayFiles(plan).control.cancel, "")
    RayBackend().stop(plan)
    ray.wait_for(lambda: RayBackend().state(plan) == "gone", "end")
    ended = read_json(RayFiles(plan).control.ended)
    assert ended is not None
    assert (ended["state"], ended["reason"]) == ("cancelled", "before it began")
    ray.wait_for(lambda: not ray.kept(), "Ray without anything of the job")


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_lost_answer_is_settled_by_the_jobs_id(
    ray: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accepted is there once, what never arrived has ended; silence is no end."""
    monkeypatch.setattr(backend, "_ARRIVE_S", 0.0)
    monkeypatch.setattr(backend, "_asked", LastAnswers())
    with FaultProxy(ray.url) as proxy:
        config = RayConfig(address=proxy.endpoint, resources={"none": 1})
        plan = _recorded(tmp_path / "run", job_id="ray-lost", gpus_per_node=0, python=sys.executable, ray=config)
        proxy.begin(Schedule(seed=1, rate=1.0, faults=("lost_reply",)))
        with pytest.raises(UsageError, match="no Ray cluster answers there"):
            RayBackend().check(plan)
        RayFiles(plan).address.write_text(proxy.endpoint)
        assert RayBackend().state(plan) == "unknown"
        assert "does not answer" in RayBackend().reason(plan)
        proxy.begin(_OnlyPosts(seed=1, rate=1.0, faults=("lost_reply",)))
        RayBackend().submit(plan)
        assert [found["submission_id"] for found in ray.get("/api/jobs/")].count(plan.job_id) == 1
        assert RayBackend().state(plan) == "alive"
        RayBackend().kill(plan)
        ray.wait_for(lambda: not ray.kept(), "Ray without anything of the job")
        never = _recorded(tmp_path / "never", job_id="ray-never", ray=RayConfig(address=ray.url))
        assert Jobs(ray.url).look(never.job_id) is None
        assert RayBackend().state(never) == "gone"
        ended = read_json(RayFiles(never).control.ended)
        assert ended is not None
        assert "it never arrived" in ended["reason"]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_launches_that_are_killed_at_their_calls(
    ray: RayCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of the schedules of test_ray_schedules.py, on a real Ray, to which each costs a second of a core."""
    number = int(os.environ.get("DTRAIN_RAY_REAL_SCHEDULES", "4"))
    seed = random.SystemRandom().randrange(1, 1 << 30)
    with capsys.disabled():
        print(f"\nseed {seed} (DTRAIN_RAY_REAL_SCHEDULES={number})")
    wrong = rayschedules.play_all(ray.url, ray.jobs, tmp_path, seed=seed, number=number)
    assert not wrong, "\n".join(wrong)


class _OnlyPosts(Schedule):
    def fault(self, method: str, key: str, count: int) -> str | None:
        return self.faults[0] if method == "POST" else None
