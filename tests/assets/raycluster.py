"""A real Ray cluster of four nodes on this machine, for tests: a head and three more, each `ray start` with one CPU.

    with ray_cluster(root) as cluster:
        cluster.url                         # of its Jobs API
        cluster.kill_node(3)                # a power failure: everything on it, ours included

A node's processes are known by a variable that they inherit. Nothing is left in /tmp, /dev/shm or among the processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from debian import Missing
from freeports import free_ports

NODES = 4
MARK = "DTRAIN_TESTS_RAY_NODE"
START_S = 60.0  # of one node; Ray itself gives up after 30
STARTS = 3
POLL_S = 0.1
SETTINGS = {
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers where another test has filled the memory
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "OMP_NUM_THREADS": "1",
}


class RayCluster:
    """`root`: an empty folder with a short path (it holds Unix sockets)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._id = uuid.uuid4().hex[:12]
        self._gcs, self._api, self._client_port = free_ports(3)
        self.url = f"http://127.0.0.1:{self._api}"

    def start(self) -> None:
        """Returns when four nodes are alive. Raises RuntimeError."""
        for node in range(NODES):  # one by one: Ray gives each half a minute, in which two cores can't start three
            self.start_node(node)

    def stop(self) -> None:
        for node in reversed(range(NODES)):
            self.kill_node(node)
        deadline = time.monotonic() + 5
        while (self.root / "t").exists() and time.monotonic() < deadline:  # a file may be made while others are removed
            shutil.rmtree(self.root / "t", ignore_errors=True)

    def start_node(self, node: int) -> None:
        """Node 0 is the head. Done at once for one that is there."""
        if self._pids(node):
            return
        for _ in range(STARTS):
            if self._try_start(node):
                return
            self.kill_node(node)
        raise RuntimeError(f"Ray's node {node} does not start: {self._log(node).read_text()[-2000:]}")

    def kill_node(self, node: int) -> None:
        for _ in range(200):
            if not (found := self._pids(node)):
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        raise RuntimeError(f"processes of Ray's node {node} do not end: {self._pids(node)}")

    def restore(self) -> None:
        """Starts what a test has killed, and waits until Ray holds four nodes for alive."""
        for node in range(NODES):
            self.start_node(node)
        self.wait_for(lambda: len(self.node_ids()) == NODES, "four nodes")

    def clear(self) -> list[str]:
        """Restored, and without jobs: those that were left are stopped and named."""
        self.restore()
        left = self.jobs()
        for job in left:
            self._ask("POST", f"/api/jobs/{job}/stop")
        return left

    # What Ray tells.

    def get(self, path: str) -> Any:
        return json.loads(self._ask("GET", path))

    def node_ids(self) -> list[str]:
        """Of those alive."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        return [node["raylet"]["nodeId"] for node in summary if node["raylet"].get("state") == "ALIVE"]

    def jobs(self) -> list[str]:
        """Those that are not over."""
        found = self.get("/api/jobs/")
        return [str(job["submission_id"]) for job in found if job["status"] in ("PENDING", "RUNNING")]

    def kept(self) -> list[str]:
        """Actors and placement groups that are not gone; Ray's own, of the Jobs API, left out."""
        actors = self.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
        groups = self.get("/api/v0/placement_groups?limit=1000")["data"]["result"]["result"]
        found = [f"actor {a['name'] or a['class_name']} {a['state']}" for a in actors if a["state"] != "DEAD"]
        found += [f"placement group {g['name']} {g['state']}" for g in groups if g["state"] != "REMOVED"]
        return [words for words in found if "_ray_internal_job_actor" not in words]

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {timeout_s:g} s: {self.kept()}")
            time.sleep(POLL_S)

    def _ask(self, method: str, path: str) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=30) as answer:
            return bytes(answer.read())

    # Its processes.

    def _try_start(self, node: int) -> bool:
        before = set() if node == 0 else set(self.node_ids())
        self._spawn(node)
        deadline = time.monotonic() + START_S
        while self._pids(node) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if set(self.node_ids()) - before:
                    return True
            time.sleep(POLL_S)
        return False

    def _spawn(self, node: int) -> None:
        """No child of this process: a test during which it is started owns it not."""
        listen, metrics, runtime = free_ports(3)
        words = [
            "--block", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={listen}",
            f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}", "--include-log-monitor=false",
        ]  # fmt: skip
        if node == 0:
            words += [
                "--head", f"--port={self._gcs}", f"--dashboard-port={self._api}", f"--temp-dir={self.root / 't'}",
                "--include-dashboard=true", "--no-monitor", f"--ray-client-server-port={self._client_port}",
            ]  # fmt: skip
        else:
            words.append(f"--address=127.0.0.1:{self._gcs}")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DTRAIN_"))}
        environ = {**kept, **SETTINGS, MARK: f"{self._id}-{node}", "TMPDIR": str(self.root)}
        with open(self._log(node), "wb") as log:
            subprocess.run(
                ["setsid", "--fork", sys.executable, "-m", "ray.scripts.scripts", "start", *words], env=environ,
                cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
            )  # fmt: skip

    def _log(self, node: int) -> Path:
        return self.root / f"node-{node}.log"

    def _pids(self, node: int) -> list[int]:
        """What was started on it and lives."""
        mark = f"{MARK}={self._id}-{node}\0".encode()
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                dead = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
                if not dead and mark in Path(f"/proc/{name}/environ").read_bytes() + b"\0":
                    found.append(int(name))
        return found


@contextlib.contextmanager
def ray_cluster(root: Path) -> Iterator[RayCluster]:
    """`root`: an empty directory. Raises debian.Missing."""
    if importlib.util.find_spec("ray") is None:
        raise Missing("Ray is not installed: pip install 'dtrain[ray]'")
    cluster = RayCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
