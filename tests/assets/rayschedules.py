"""Random schedules of the ray back end's clients: a launch is killed before or after one of its calls of the Jobs API
has its effect, or the call fails; others follow it. The driver is ours as far as to where it would put its keeper into
Ray: there it waits for the job's end.

    wrong = play_all(url, alive, folder, seed=1, number=100)
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from clients import Client, Clients, failures_of
from faultproxy import FaultProxy
from faultproxy import Schedule as Faults

from dtrain.cluster.rundir import RunDir, read_json

AT_ONCE = 4
LIMIT_S = 90.0  # as long as a busy machine may take
AGAIN_S = 2.0  # to the next launch, while there is nothing of the run
SEEN_S = 0.5  # for what has come late to begin, if it does
LATE_S = 1.5  # more than a client in a hurry waits before it takes its request for lost
POST = 3  # the call of a first launch that submits
# What becomes of the call of a client that is killed: see faultproxy.FAULTS.
KILLED = {"killed before": "reset_request", "killed, and it comes late": "late", "killed after": "lost_reply"}
FAULTS = (*KILLED, *KILLED, "late", "500", "lost_reply", "reset_request")

# In place of Ray's Python. The driver as far as its own: then it says that the job has begun, and waits for its end.
_PYTHON = """\
#!{python} -P
import os, sys, time
from dtrain.cluster.ray import driver
from dtrain.cluster.ray.files import Standing
from dtrain.cluster.rundir import put_end

def follow(plan, files, key):
    driver._pass_stops_on(files)
    with open(plan.run_dir + "/started", "a") as file:
        print(plan.job_id, os.getpid(), file=file)
    until = time.monotonic() + 300
    while not files.is_over() and time.monotonic() < until:
        if files.control.stop(0).exists():
            put_end(files.run, files.control, state="cancelled", exit_code=3, reason="", step=0)
        time.sleep(0.05)
    files.put_standing(Standing(phase="over"))
    return ""

driver._follow = follow
sys.exit(driver.main(sys.argv[sys.argv.index("dtrain.cluster.ray.driver") + 1:]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accident(Faults):
    """The call number `due` of one client meets it."""

    name: str
    due: int
    client: Future[Client]
    calls: list[str] = field(default_factory=list)

    def fault(self, method: str, key: str, count: int) -> str | None:
        self.calls.append(f"{method} {key}")
        if not self.name or len(self.calls) != self.due:
            return None
        if self.name == "killed before":
            self.client.result(10).kill()
        return KILLED.get(self.name, self.name)

    def read(self, fault: str | None) -> None:
        if fault is not None and self.name in KILLED:
            self.client.result(10).kill()


@dataclass
class Schedule:
    """`alive`: the jobs that the engine has and that are not over."""

    seed: int
    run_dir: Path
    python: Path
    clients: Clients
    url: str
    alive: Callable[[], list[str]]
    log: list[str] = field(default_factory=list)

    def play(self) -> list[str]:
        """What is wrong after the storm."""
        rng = random.Random(self.seed)
        with FaultProxy(self.url, late_s=LATE_S) as proxy:
            for _ in range(rng.randint(1, 3)):
                self.act(proxy, "launch", rng.choice((*FAULTS, "")), rng.choice((1, 2, POST, POST, POST, 4)))
            if rng.random() < 0.3:
                self.act(proxy, "cancel", rng.choice(FAULTS), rng.randint(1, 5))
            return self.judge(proxy)

    def act(self, proxy: FaultProxy, action: str, fault: str = "", due: int = 0) -> str:
        client: Future[Client] = Future()
        proxy.begin(accident := Accident(seed=0, rate=0.0, name=fault, due=due, client=client))
        plan = {"backend": "ray", "ray": {"address": proxy.endpoint}}
        words = (action, str(self.run_dir), str(self.python))
        client.set_result(self.clients.start(words, {"CLIENT_PLAN": json.dumps(plan)}, whole=False))
        said = client.result().wait()
        self.log.append(f"{action}, {fault} at {due} of {accident.calls}: {said[-300:]}")
        return said

    def begun(self) -> list[tuple[str, int]]:
        """Job and process of each driver that has gone as far as to begin."""
        started = self.run_dir / "started"
        lines = [line.split() for line in started.read_text().splitlines()] if started.exists() else []
        return [(job, int(pid)) for job, pid in lines]

    def lives(self) -> list[str]:
        """Jobs whose driver is there."""
        return [job for job, pid in self.begun() if str(self.run_dir).encode() in _command_line(pid)]

    def job(self) -> str:
        return str((read_json(self.run_dir / "job.json") or {}).get("job_id"))

    def is_settled(self) -> bool:
        """The run's job goes on, alone: those that were superseded or cancelled are gone."""
        return self.lives() == [self.job()] and not RunDir(self.run_dir).control(self.job()).ended.exists()

    def judge(self, proxy: FaultProxy) -> list[str]:
        deadline = time.monotonic() + LIMIT_S
        while not self.is_settled() and time.monotonic() < deadline:
            self.act(proxy, "launch")
            until(self.is_settled, AGAIN_S)
        proxy.settle()  # what is late has come
        time.sleep(SEEN_S)
        until(self.is_settled, AGAIN_S)
        found = re.search(r"^{.*}$", self.act(proxy, "status"), re.MULTILINE)
        state = json.loads(found[0])["state"] if found else "none"
        lives, wrong = self.lives(), []
        if not self.is_settled():
            wrong.append(f"the run's job is {self.job()}, and there are {lives}")
        if twice := [name for name, count in Counter(name for name, _ in self.begun()).items() if count > 1]:
            wrong.append(f"begun twice: {twice}")
        if state not in ("pending", "running"):
            wrong.append(f"called {state}, and lives: {lives}")
        self.act(proxy, "cancel")
        mine = {path.name for path in (self.run_dir / "control").iterdir()}
        until(lambda: not self.lives() and not mine & set(self.alive()), LIMIT_S)
        if left := self.lives() + sorted(mine & set(self.alive())):
            wrong.append(f"left by a cancel: {left}")
        return wrong


def until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def play_all(url: str, alive: Callable[[], list[str]], folder: Path, *, seed: int, number: int) -> list[str]:
    """What has gone wrong, with what had been done. `alive`: the jobs of the API at `url` that are not over."""
    python = folder / "python"
    python.write_text(_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    clients = Clients(folder, engine="ray")
    made = [Schedule(seed + n, folder / f"run-{n}", python, clients, url, alive) for n in range(number)]
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return failures_of(made, pool.map(Schedule.play, made))
    finally:
        clients.close()
