"""What every back end is held to: the same tests for all, through the command line. A test file takes those of its
engine by `tests_of`, and offers the fixture `engine`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import Engine, marked
from launched import CONFIG, DTRAIN

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.launcher.conformance import NOT_BY_DESIGN, NOT_SHOWN

ASSETS = Path(__file__).parent
HOSTILE = 'it\'s "q" $(touch owned) `id` \\ a;b|c&d {x,y}* ~ %j ünï\nline\t'
CANARY = "canary-4711-value"
_OTHERS = ("SLURM_PROCID", "SLURM_LOCALID", "PMI_", "RAY_JOB", "KUBERNETES_", "JOB_COMPLETION")
LIMIT_S = 150.0
SHOWS: dict[str, tuple[str, ...]] = {}  # test -> points
_TESTS: dict[str, Callable[..., None]] = {}


def shows(*points: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def keep(test: Callable[..., None]) -> Callable[..., None]:
        SHOWS[test.__name__], _TESTS[test.__name__] = points, test
        pytest.mark.timeout(600)(pytest.mark.e2e(test))
        return test

    return keep


def tests_of(engine: str) -> dict[str, Any]:
    """Names and values for a test file: the tests whose points are this engine's affair, and their fixture."""
    mine = {
        name: test
        for name, test in _TESTS.items()
        if not any((engine, point) in (*NOT_BY_DESIGN, *NOT_SHOWN) for point in SHOWS[name])
    }
    return {**mine, "cell": cell}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run, launched any number of times. Its ranks are cell.py's."""

    engine: Engine
    world: int
    folder: Path
    run: RunDir
    config: Path

    def launch(self, *words: str) -> subprocess.Popen[bytes]:
        argv = [*self.engine.before, DTRAIN, self.engine.command, str(self.config), "--run-dir", str(self.run.path)]
        with open(self.folder / "said", "ab") as output:
            return subprocess.Popen([*argv, *words], stdout=output, stderr=output, env=self._environ())

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command about the run, which ends by itself."""
        return subprocess.run(
            [DTRAIN, *words, str(self.run.path)], capture_output=True, text=True, timeout=LIMIT_S, check=False,
            env=self._environ(),
        )  # fmt: skip

    def _environ(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(ASSETS), "OMP_NUM_THREADS": "1", "CANARY": CANARY, "CELL_MARK": str(self.folder)}
        return {**os.environ, **self.engine.environ, **own}

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def end(self, process: subprocess.Popen[bytes]) -> int:
        self.until(lambda: process.poll() is not None, "the end of the launch")
        return int(process.returncode)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in sorted(self.run.path.glob("logs/**/*"))]
                pytest.fail("\n".join([f"{what}: not in time", self.said, *logs]))
            time.sleep(0.05)

    def seen(self, start: int = 1) -> list[dict[str, Any]]:
        """What reached the ranks when they started for the start-th time."""
        found = [self.folder / f"seen-{rank}-{start}.json" for rank in range(self.world)]
        self.until(lambda: all(path.exists() for path in found), f"start {start} of all ranks")
        return [json.loads(path.read_text()) for path in found]

    def go(self) -> None:
        (self.folder / "go").touch()

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.ask("status", "--json").stdout))

    def runs(self) -> None:
        """status tells of the ranks that were seen, and before it does, of nothing else than a run that lives: the last
        word that was put down may be older than they."""

        def told() -> bool:
            status = self.status()
            assert status["state"] in ("pending", "requeued", "running", "unknown"), (status, self.said)
            return bool(status["state"] == "running")

        self.until(told, "a status that tells of the run")

    def is_over(self) -> bool:
        """By its records."""
        return self.run.control(str((read_json(self.run.job) or {}).get("job_id"))).ended.exists()

    def processes(self) -> list[psutil.Process]:
        """Workers, and what has started them, wherever they are."""
        return marked(f"CELL={self.folder}\0")

    def worker(self, rank: int) -> psutil.Process:
        """Its process as this host sees it: on a simulated machine it has another number."""
        pid = str(self.seen()[rank]["pid"])
        inside = {process: Path(f"/proc/{process.pid}/status").read_text() for process in self.processes()}
        return next(p for p, text in inside.items() if re.search(rf"^NSpid:.*\b{pid}$", text, re.MULTILINE))

    def agents(self) -> list[psutil.Process]:
        """Those that were started plainly."""
        words = {"dtrain.runtime.agent", str(self.run.path)}
        return [p for p in psutil.process_iter(["cmdline"]) if words <= set(p.info["cmdline"] or ())]

    def node_records(self) -> list[dict[str, Any] | None]:
        job = read_json(self.run.job) or {}
        control = self.run.control(str(job.get("job_id")))
        return [read_json(control.node(node)) for node in range(self.engine.nodes)]

    def assert_nothing_left(self) -> None:
        self.until(lambda: not self.processes(), f"no process of the run: {self.processes()}")
        self.until(lambda: not self.engine.left(), f"nothing in the engine: {self.engine.left()}")


@pytest.fixture
def cell(engine: Engine, tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    """cell(name, argument, more of cluster, environment) -> Cell. What still goes on is cancelled. `procs`: workers of
    a node; left out: the engine's. One alone is started plainly, which is quicker."""
    made: list[Cell] = []
    shutil.copy(ASSETS / "cell.py", tmp_path / "cell.py")

    def make(
        name: str = "run", argument: str = "", cluster: dict[str, Any] | None = None, *, procs: int = 0, **env: str
    ) -> Cell:
        procs = procs or engine.procs
        folder = tmp_path / f"of {len(made)}"
        folder.mkdir()
        shape = {"nodes": 2, "procs_per_node": procs, "env": {"CELL": str(folder), **env}, **engine.cluster}
        script = f"cell.py {_quoted(argument)}" if argument else "cell.py"
        config = tmp_path / f"cfg-{len(made)}.json"
        recovery = {"workers": "exec" if procs == 1 else "warm"}
        config.write_text(json.dumps({"script": script, "cluster": {**shape, **(cluster or {})}, "recovery": recovery}))
        made.append(Cell(engine=engine, world=2 * procs, folder=folder, run=RunDir(tmp_path / name), config=config))
        return made[-1]

    yield make
    for one in made:
        one.go()
        if one.run.job.exists() and not one.is_over():
            one.ask("cancel")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


@shows("environment", "rank order", "addresses", "output", "hostile values", "secrets", "exit codes", "nothing left")
def test_what_reaches_the_ranks(cell: Callable[..., Cell], engine: Engine) -> None:
    one = cell("a b; rm -rf ~ $(touch owned) 'c' ü", HOSTILE, {"secrets": ["CANARY"]}, procs=2, VALUE=HOSTILE)
    process, lines = one.launch(), set[bytes]()
    while process.poll() is None and not list(one.folder.glob("seen-*")):
        lines |= _command_lines()
    seen = one.seen()
    one.go()
    assert one.end(process) == exits.DONE, one.said
    environs = [rank["environ"] for rank in seen]
    per_node = 4 // engine.nodes
    for rank, environ in enumerate(environs):
        place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node}
        place |= {"GROUP_RANK": rank // per_node}
        assert {name: environ[name] for name in place} == {name: str(value) for name, value in place.items()}
        assert not [name for name in environ if name.startswith(_OTHERS)]
        assert (environ["VALUE"], environ["CANARY"]) == (HOSTILE, CANARY)
    assert len({(environ["MASTER_ADDR"], environ["MASTER_PORT"]) for environ in environs}) == 1
    assert [rank["argv"] for rank in seen] == [[HOSTILE]] * 4
    assert len({(rank["host"], rank["parent"]) for rank in seen}) == engine.nodes
    for rank in range(4):
        log = one.ask("logs", "--rank", str(rank)).stdout
        assert f"out of {rank}\n" in log
        assert f"err of {rank}\n" in log
    assert not list(one.folder.parent.rglob("owned"))
    assert not [line for line in lines if CANARY.encode() in line]
    files = [path for path in one.run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in one.said
    one.assert_nothing_left()


def _command_lines() -> set[bytes]:
    """Of all processes."""
    found = set()
    for pid in psutil.pids():
        with suppress(OSError):
            found.add(Path(f"/proc/{pid}/cmdline").read_bytes())
    time.sleep(0.02)
    return found


@shows("worker crash", "submit twice", "cancel", "nothing left")
def test_a_worker_that_dies_and_a_second_launch(cell: Callable[..., Cell]) -> None:
    one = cell()
    process = one.launch()
    one.seen()
    nodes, job = one.node_records(), read_json(one.run.job)
    one.worker(one.world - 1).kill()
    one.seen(start=2)
    assert one.node_records() == nodes
    second = one.launch()
    assert one.end(second) == exits.USAGE, one.said
    assert read_json(one.run.job) == job
    one.runs()
    assert one.ask("cancel").returncode == 0
    assert one.end(process) == exits.CANCELLED, one.said
    one.assert_nothing_left()
    assert one.ask("cancel").returncode == 0
    assert one.status()["state"] == "cancelled"


@shows("failing workers", "nothing left")
def test_codes_of_the_workers(cell: Callable[..., Cell]) -> None:
    for code, starts in ((7, 2), (exits.NEVER_RETRY, 1)):
        one = cell(f"run-{code}", CELL_DO=f"exit {code}")
        assert one.end(one.launch()) == exits.NEVER_RETRY, one.said
        assert len(list(one.folder.glob("seen-0-*"))) <= starts
        assert one.status()["state"] == "failed"
        assert str(code) in str(read_json(one.run.failure))
        one.assert_nothing_left()


@shows("cancel of what starts", "nothing left")
def test_cancel_while_it_starts(cell: Callable[..., Cell], tmp_path: Path) -> None:
    """In its nodes' setup lines, before anything of dtrain's runs there; the check before a launch goes through."""
    line = f'if [ -e "{tmp_path}/run/control" ]; then touch "{tmp_path}/begun"; sleep 600; fi'
    one = cell(cluster={"setup": [line]})
    process = one.launch()
    one.until((tmp_path / "begun").exists, "the setup lines")
    assert one.ask("cancel").returncode == 0, one.said
    assert one.end(process) == exits.CANCELLED, one.said
    assert not list(one.folder.glob("seen-*"))
    one.assert_nothing_left()


@shows("cancel", "signals", "exit codes", "nothing left")
def test_a_signal_and_a_cancel_while_it_saves(cell: Callable[..., Cell], engine: Engine) -> None:
    one = cell(CELL_SAVE_S="6")
    process = one.launch()
    one.seen()
    _leader(process).send_signal(signal.SIGTERM if engine.before else signal.SIGINT)
    if engine.detaches:
        assert one.end(process) == exits.DETACHED, one.said
        one.runs()
    else:
        assert one.end(process) == exits.STOPPED, one.said
        assert one.status()["state"] == "stopped"
        one.assert_nothing_left()
        process = one.launch()
        one.seen(start=2)
    for path in one.folder.glob("saving-*"):
        path.unlink()
    first = subprocess.Popen([DTRAIN, "cancel", str(one.run.path)], stdout=subprocess.DEVNULL, env=one._environ())
    one.until(lambda: list(one.folder.glob("saving-*")), "the ranks' saving")
    one.until(lambda: one.status()["state"] == "stopping", "a status that tells of it")
    assert one.ask("cancel").returncode == 0
    assert first.wait(60) == 0
    assert one.status()["state"] == "cancelled"
    assert engine.detaches or one.end(process) == exits.CANCELLED
    one.assert_nothing_left()


def _leader(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process that follows the run: of mpirun's ranks the first."""
    found = psutil.Process(process.pid)
    ranks = [p for p in found.children(recursive=True) if "run" in p.cmdline() and DTRAIN in p.cmdline()]
    return min((p for p in ranks if p.environ().get("PMI_RANK") == "0"), key=lambda p: p.pid, default=found)


@shows("cancel of what waits", "nothing left")
def test_cancel_of_what_waits(cell: Callable[..., Cell], engine: Engine) -> None:
    one = cell()
    with engine.full():
        process = one.launch()
        one.until(lambda: one.run.job.exists() and _waits(one.status()), "a job that waits, and why")
        assert one.ask("cancel").returncode == 0
        assert one.end(process) == exits.CANCELLED, one.said
        assert one.status()["state"] == "cancelled"
    assert not list(one.folder.glob("seen-*"))
    one.assert_nothing_left()


def _waits(status: dict[str, Any]) -> bool:
    return status["state"] == "pending" and bool(status["reason"])


@shows("node loss", "nothing left")
def test_a_machine_that_dies(cell: Callable[..., Cell], engine: Engine) -> None:
    assert engine.lose is not None
    one = cell()
    process = one.launch()
    seen = one.seen()
    agents = [int(record["pid"]) for record in one.node_records() if record is not None]
    try:
        engine.lose(agents, [seen[0]["host"], seen[-1]["host"]])
        one.seen(start=2)
        one.go()
        assert one.end(process) == exits.DONE, one.said
    finally:
        if engine.restore is not None:
            engine.restore()
    one.assert_nothing_left()


@shows("requeue", "nothing left")
def test_a_job_that_is_started_again(cell: Callable[..., Cell], engine: Engine) -> None:
    assert engine.again is not None
    one = cell()
    process = one.launch()
    one.seen()
    engine.again()
    one.seen(start=2)
    one.go()
    assert one.end(process) == exits.DONE, one.said
    one.assert_nothing_left()


@shows("silence", "nothing left")
def test_an_engine_that_does_not_answer(cell: Callable[..., Cell], engine: Engine) -> None:
    one = cell()
    process = one.launch()
    one.seen()
    one.runs()
    job = read_json(one.run.job)
    with engine.silent():
        assert (said := one.status())["state"] in ("running", "unknown"), said
        frozen = one.agents()
        for agent in frozen:
            agent.suspend()
        try:
            time.sleep(11)  # the age at which the run directory no longer tells of life
            assert (said := one.status())["state"] in ("running", "unknown"), said
            assert one.end(one.launch()) == exits.USAGE, one.said
            assert read_json(one.run.job) == job
        finally:
            for agent in frozen:
                agent.resume()
    one.runs()
    one.go()
    assert one.end(process) == exits.DONE, one.said
    one.assert_nothing_left()


@shows("same losses")
def test_the_losses_of_the_local_back_end(engine: Engine, tmp_path: Path) -> None:
    """At a world size of two, which under mpirun is one machine's; one config, of which only the engine differs."""
    shutil.copy(ASSETS / "parity.py", tmp_path)  # pods have the code that travels, and no other
    found = set()
    for name, one in (("local", Engine(name="local", cluster={})), (engine.name, engine)):
        nodes = {"nodes": 2} if one.nodes == 2 else {}
        cluster = {**nodes, "env": {"OMP_NUM_THREADS": "1"}, **one.cluster}  # what is exported here reaches no pod
        train = {**CONFIG, "train": {"steps": 12, "clip_grad_norm": 1.0}, "cluster": cluster}
        (tmp_path / f"{name}.json").write_text(json.dumps(train))
        before = [word.replace("4", "2") if word == "4" else word for word in one.before]
        done = subprocess.run(
            [*before, DTRAIN, one.command, str(tmp_path / f"{name}.json"), "--run-dir", str(tmp_path / name)],
            env={**os.environ, **one.environ, "PYTHONPATH": str(ASSETS), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        losses = [(record["step"], record["loss"]) for record in read_jsonl(RunDir(tmp_path / name).metrics)]
        assert [step for step, _ in losses] == list(range(1, 13))
        found.add(hashlib.sha256(json.dumps(losses).encode()).hexdigest())
    assert len(found) == 1
