"""100 random schedules of the Kubernetes back end: a launch is killed before, while or after one of its requests, the
request is cut, or arrives when its sender is long dead; others follow it. A run has one Job or none, and a cancel ends
all. The pods wait at a gate, so that they cost nothing: those of a late Job are let in, and find that it is over.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from clients import Clients, failures_of
from killedcalls import FAULTS
from kubeserver_store import delete, key_of

from dtrain.cluster.kubernetes.names import JOB_ID, RUN_DIR
from dtrain.launcher.runs import read_job
from dtrain.launcher.state import read_status

if TYPE_CHECKING:
    from kubeserver import KubeServer

SCHEDULES = int(os.environ.get("DTRAIN_KUBERNETES_SCHEDULES", "100"))
SEED = int(os.environ.get("DTRAIN_KUBERNETES_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
AT_ONCE = 6
GATE = "example.com/wait"
CREATES = 2  # of a first launch: all of its requests


@dataclass
class Schedule:
    seed: int
    run_dir: Path
    server: KubeServer
    clients: Clients
    log: list[str] = field(default_factory=list)

    def play(self) -> list[str]:
        """What is wrong after the storm."""
        rng = random.Random(self.seed)
        self.act("launch", fault=rng.choice(FAULTS), at=rng.randint(1, CREATES))
        for _ in range(rng.randint(0, 2)):
            action = "cancel" if rng.random() < 0.2 else "launch"
            self.act(action, fault=rng.choice((*FAULTS, "")), at=rng.randint(1, 6))
        self.until(lambda: not self.run_dir.with_suffix(".late").exists())
        self.act("launch")
        return [*self.judge(), *self.ended(by_cancel=rng.random() < 0.3)]

    def act(self, action: str, *, fault: str = "", at: int = 1) -> str:
        late = {"REQUEST_LATE": str(self.run_dir.with_suffix(".late"))}
        environ = {"REQUEST_FAULT": fault, "REQUEST_AT": str(at), **late} if fault else {}
        said = self.clients.start((action, str(self.run_dir), "python3"), environ, whole=False).wait()
        self.log.append(f"{action} {fault} {at}: {said[-300:]}")
        return said

    def until(self, condition: Callable[[], object], limit_s: float = 90.0) -> bool:
        deadline = time.monotonic() + limit_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(condition())

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Of this run, by their ids."""
        found = [job for job in self.server.store.objects("jobs") if self.of_run(job)]
        return {job["metadata"]["labels"][JOB_ID]: job for job in found}

    def of_run(self, one: dict[str, Any]) -> bool:
        return bool((one["metadata"].get("annotations") or {}).get(RUN_DIR) == str(self.run_dir))

    def judge(self) -> list[str]:
        job = read_job(self.run_dir)
        assert job is not None
        state, newest = read_status(job, look_for_checkpoint=False)["state"], job.plan.job_id
        ids = set(self.jobs())
        wrong = [f"a Job of no run: {late}" for late in ids - {newest} if not self.ends_by_itself(late)]
        if state != "pending" or newest not in ids:  # the last launch went through, or found a run that lives
            wrong.append(f"called {state}, has the Jobs {ids}")
        services = [one["metadata"]["labels"][JOB_ID] for one in self.server.store.objects("services")]
        if services.count(newest) != 1:
            wrong.append(f"{services.count(newest)} Services")
        return wrong

    def ends_by_itself(self, job_id: str) -> bool:
        """Whether the pods of a Job that came too late find that it is over."""
        for pod in self.server.pods():
            if pod["metadata"]["labels"][JOB_ID] == job_id:
                name = pod["metadata"]["name"]
                self.server.store.edit(("pods", self.server.namespace, name), _let_in)
        return self.until(lambda: job_id not in self.jobs())

    def ended(self, *, by_cancel: bool) -> list[str]:
        if by_cancel:
            self.act("cancel")
        for job in () if by_cancel else self.jobs().values():
            delete(self.server.store, key_of(job), {"propagationPolicy": "Background"})
        gone = self.until(lambda: not self.jobs())
        return [] if gone else [f"left by a cancel: {list(self.jobs())}"]


def _let_in(pod: dict[str, Any]) -> None:
    pod["spec"].pop("schedulingGates", None)


@pytest.fixture
def schedules(kubernetes: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Schedule]]:
    asked = {
        "image": "dtrain:1", "user": 0, "groups": [0], "grace_s": 5, "keep_s": 0,
        "volumes": {str(tmp_path): f"host:{tmp_path}"}, "pod": {"schedulingGates": [{"name": GATE}]},
    }  # fmt: skip
    monkeypatch.setenv("CLIENT_PLAN", json.dumps({"backend": "kubernetes", "nodes": 1, "kubernetes": asked}))
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    clients = Clients(tmp_path, "kubernetes")
    yield [Schedule(SEED + n, tmp_path / f"run-{n}", kubernetes, clients) for n in range(SCHEDULES)]
    clients.close()


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_no_schedule_loses_or_doubles_a_job(schedules: list[Schedule], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nseed {SEED} (DTRAIN_KUBERNETES_SEED repeats it, DTRAIN_KUBERNETES_SCHEDULES={SCHEDULES})")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        failures = failures_of(schedules, pool.map(Schedule.play, schedules))
    assert not failures, "\n".join(failures)
