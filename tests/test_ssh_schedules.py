"""100 random schedules of the ssh back end: a launch is killed before, while or after one of its calls of ssh, or the
call fails; others follow it. No node is without its run, none is started twice, and a cancel ends them all.

The calls go to a script in ssh's place, which runs on this machine what would go to another: what sshd does is
test_ssh.py's. The agents only wait.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from clients import Clients, failures_of

from dtrain.cluster.rundir import read_json

SCHEDULES = int(os.environ.get("DTRAIN_SSH_SCHEDULES", "100"))
SEED = int(os.environ.get("DTRAIN_SSH_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
AT_ONCE = 8
FAULTS = ("killed before", "killed while", "killed after", "fails", "no answer", "is cut")
NODES = 2

# $PPID: the launching process. FAULT_AT: at which of its calls.
_SSH = """\
#!/bin/bash
run() { env -u FAULT -u FAULT_AT -u FAULT_DIR bash -c "${!#}"; }
[ -n "${FAULT-}" ] || { run "$@"; exit; }
for n in 1 2 3 4 5 6 7 8 9; do mkdir "$FAULT_DIR/$n" 2>/dev/null && break; done
[ "$n" = "$FAULT_AT" ] || { run "$@"; exit; }
case "$FAULT" in
  "killed before") kill -KILL $PPID;;
  "killed while") text=$(cat); kill -KILL $PPID; run "$@" <<<"$text" >/dev/null;;
  "killed after") run "$@"; kill -KILL $PPID;;
  "fails") echo "ssh: connect to host: Connection refused" >&2; exit 255;;
  "no answer") run "$@" >/dev/null; exit 255;;
  "is cut") head -c 200 | run "$@"; exit 255;;
esac
"""
# In place of an agent: says that it is there, and waits until it is asked to end, its job has ended, or the run has
# another one, as runtime/agent.py does.
_AGENT = """\
#!{python} -IS
import os, signal, sys, time
if "--node-rank" not in sys.argv:
    sys.exit(0)  # the look at this Python
given = dict(zip(sys.argv, sys.argv[1:]))
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
with open(given["--run-dir"] + "/started", "a") as file:
    print(given["--job-id"], given["--node-rank"], os.getpid(), file=file)
run, job = given["--run-dir"], given["--job-id"]
until = time.monotonic() + 300
while not seen and time.monotonic() < until:
    if os.path.exists(f"{{run}}/control/{{job}}/ended.json") or f'"{{job}}"' not in open(run + "/job.json").read():
        break
    time.sleep(0.05)
"""


@dataclass
class Schedule:
    seed: int
    run_dir: Path
    python: Path
    path: str
    clients: Clients
    log: list[str] = field(default_factory=list)

    def play(self) -> None:
        rng = random.Random(self.seed)
        for number in range(rng.randint(1, 3)):
            self.act("launch", fault=rng.choice((*FAULTS, "")), at=rng.randint(1, NODES), number=number)
        if rng.random() < 0.3:
            self.act("cancel", fault=rng.choice(FAULTS), at=rng.randint(1, 4), number=8)
        self.act("launch")

    def act(self, action: str, *, fault: str = "", at: int = 1, number: int = 9) -> str:
        calls = self.run_dir.with_suffix(f".calls-{number}")
        calls.mkdir(exist_ok=True)
        environ = {"FAULT": fault, "FAULT_AT": str(at), "FAULT_DIR": str(calls)} if fault else {}
        plan = {"backend": "ssh", "nodes": NODES, "hosts": [f"node{n}" for n in range(NODES)]}
        environ |= {"PATH": self.path, "CLIENT_PLAN": json.dumps(plan)}
        said = self.clients.start((action, str(self.run_dir), str(self.python)), environ, whole=False).wait()
        self.log.append(f"{action} {fault} {at}: {said[-300:]}")
        return said

    def status(self) -> dict[str, object]:
        found = re.search(r"^{.*}$", self.act("status"), re.MULTILINE)
        return dict(json.loads(found[0])) if found else {}

    def alive(self) -> list[tuple[str, str, int]]:
        """Job, node and pid of agents."""
        started = self.run_dir / "started"
        lines = [line.split() for line in started.read_text().splitlines()] if started.exists() else []
        return [(job, node, int(pid)) for job, node, pid in lines if self._lives(pid)]

    def _lives(self, pid: str) -> bool:
        try:
            return str(self.run_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def judge(self) -> list[str]:
        """What is wrong after the storm."""
        deadline = time.monotonic() + 2
        while len(self.alive()) < NODES and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # what has learned that it is superseded is gone
        alive, status = self.alive(), self.status()
        job = read_json(self.run_dir / "job.json") or {}
        wrong = []
        if twice := [one for one, count in Counter((job, node) for job, node, _ in alive).items() if count > 1]:
            wrong.append(f"started twice: {twice}")
        if orphans := [one for one in alive if one[0] != job.get("job_id")]:
            wrong.append(f"without a run: {orphans}, the run's job is {job.get('job_id')}")
        if alive and status.get("state") not in ("pending", "running"):
            wrong.append(f"called {status.get('state')}, and lives: {alive}")
        self.act("cancel")
        deadline = time.monotonic() + 2
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        if left := self.alive():
            wrong.append(f"left by a cancel: {left}")
        return wrong


@pytest.fixture
def schedules(tmp_path: Path) -> Iterator[list[Schedule]]:
    for name, text in (("ssh", _SSH), ("python", _AGENT.format(python=os.path.realpath(sys.executable)))):
        place = tmp_path / "bin" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
        place.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    clients, python = Clients(tmp_path), tmp_path / "bin" / "python"
    made = [Schedule(SEED + n, tmp_path / f"run-{n}", python, path, clients) for n in range(SCHEDULES)]
    yield made
    clients.close()
    for schedule in made:
        for _, _, pid in schedule.alive():
            os.kill(pid, 9)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_no_schedule_loses_or_doubles_a_node(schedules: list[Schedule], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nseed {SEED} (DTRAIN_SSH_SEED repeats it, DTRAIN_SSH_SCHEDULES={SCHEDULES})")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(Schedule.play, schedules))
        failures = failures_of(schedules, pool.map(Schedule.judge, schedules))
    assert not failures, "\n".join(failures)
    assert sum((schedule.run_dir / "started").exists() for schedule in schedules) > SCHEDULES // 2
