"""From submission until all agents have joined, against what each engine itself takes to start something on four nodes.

    python benchmarks/submit.py [--rounds N] [ENGINE ...]

Each engine is the tests' own, idle, with four nodes on this machine; under mpirun four ranks of one machine. In turn:
the engine alone (four processes that say that they are there), and `dtrain launch --detach`. Taken is the time from the
record of the submission to the last agent's joining, and beside it from the command's start: the checks before a
submission are the same everywhere. Medians, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "assets"))

NODES = 4
DTRAIN = str(Path(sys.executable).parent / "dtrain")
LIMIT_S = 180.0
GOAL_S = 2.0
# The script of a Ray job that starts an actor a node.
ACTORS = """
import pathlib, ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Place
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
class There:
    def say(self, number): pathlib.Path({place!r}, str(number)).touch()
group = ray.util.placement_group([{{"CPU": 1}}] * 4, strategy="STRICT_SPREAD")
ray.get(group.ready())
actors = [There.options(scheduling_strategy=Place(group, n)).remote() for n in range(4)]
ray.get([actor.say.remote(n) for n, actor in enumerate(actors)])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """`alone(place)`: has the engine start four processes, each of which makes a file in the folder `place`."""

    cluster: Mapping[str, Any]
    alone: Callable[[Path], None]
    environ: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("not in time")
        time.sleep(0.01)


@contextmanager
def local(folder: Path) -> Iterator[Contender]:
    def alone(place: Path) -> None:
        code = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
        running = [subprocess.Popen([sys.executable, "-c", code, str(place / str(n))]) for n in range(NODES)]
        for process in running:
            process.wait()

    yield Contender(cluster={}, alone=alone)


@contextmanager
def slurm(folder: Path) -> Iterator[Contender]:
    from slurmcluster import slurm_cluster

    with slurm_cluster(folder) as cluster:

        def alone(place: Path) -> None:
            touch = f"srun --ntasks-per-node=1 bash -c 'touch {place}/$SLURM_PROCID'"
            job = cluster.submit(f"-N{NODES}", "-o", "/dev/null", "--wrap", touch)
            _until(lambda: len(list(place.iterdir())) == NODES)
            cluster.wait_job(job, "COMPLETED")
            cluster.wait_idle()

        yield Contender(cluster={"backend": "slurm"}, alone=alone, environ=cluster.environ())
        cluster.clear()


@contextmanager
def ssh(folder: Path) -> Iterator[Contender]:
    import sshhosts

    assert len(sshhosts.NAMES) == NODES
    with sshhosts.ssh_hosts(folder) as hosts:

        def alone(place: Path) -> None:
            calls = [["ssh", *hosts.options, name, f"touch {place}/{name}"] for name in hosts.ports]
            for process in [subprocess.Popen(call) for call in calls]:
                process.wait()

        named = {"hosts": list(hosts.ports), "options": hosts.options}
        yield Contender(cluster={"backend": "ssh", "ssh": named}, alone=alone)


@contextmanager
def mpi(folder: Path) -> Iterator[Contender]:
    mpirun = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    if mpirun is None:
        raise ImportError("pip install mpi4py mpich")
    before = (mpirun, "-n", str(NODES))

    def alone(place: Path) -> None:
        code = "import sys; from mpi4py import MPI; open(f'{sys.argv[1]}/{MPI.COMM_WORLD.rank}', 'w')"
        subprocess.run([*before, sys.executable, "-c", code, str(place)], check=True)

    yield Contender(cluster={}, alone=alone, before=before)


@contextmanager
def ray(folder: Path) -> Iterator[Contender]:
    from ray.job_submission import JobSubmissionClient
    from raycluster import ray_cluster

    with ray_cluster(folder) as cluster:
        client = JobSubmissionClient(cluster.url)

        def alone(place: Path) -> None:
            script = folder / "actors.py"
            script.write_text(ACTORS.format(place=str(place)))
            job = client.submit_job(entrypoint=f"{sys.executable} {script}")
            _until(lambda: len(list(place.iterdir())) == NODES)
            _until(lambda: str(client.get_job_status(job)) == "SUCCEEDED" and not cluster.kept())

        yield Contender(cluster={"backend": "ray", "ray": {"address": cluster.url}}, alone=alone)


@contextmanager
def kubernetes(folder: Path) -> Iterator[Contender]:
    from kubeserver import NAMESPACE, kube_server

    with kube_server(folder) as server:
        import kubernetes.client

        batch = kubernetes.client.BatchV1Api(server.client())

        def alone(place: Path) -> None:
            batch.create_namespaced_job(NAMESPACE, bare_job(place))
            _until(lambda: len(list(place.iterdir())) == NODES)
            batch.delete_namespaced_job("alone", NAMESPACE, propagation_policy="Background")
            server.wait(lambda: not server.store.objects("jobs") and not server.pods())

        asked = {"image": "any:1", "user": 0, "keep_s": 1, "volumes": {str(folder.parent): f"host:{folder.parent}"}}
        cluster = {"backend": "kubernetes", "kubernetes": asked}
        yield Contender(cluster=cluster, alone=alone, environ={"KUBECONFIG": str(server.kubeconfig)})


def bare_job(place: Path) -> dict[str, Any]:
    """An Indexed Job whose pods make a file each."""
    container = {
        "name": "main", "image": "any:1", "command": ["bash", "-c", 'touch "$0/$JOB_COMPLETION_INDEX"', str(place)],
        "volumeMounts": [{"name": "place", "mountPath": str(place)}],
    }  # fmt: skip
    volume = {"name": "place", "hostPath": {"path": str(place)}}
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [volume]}
    indexed = {"completionMode": "Indexed", "completions": NODES, "parallelism": NODES}
    spec = {**indexed, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "alone"}, "spec": spec}


ENGINES = {"local": local, "slurm": slurm, "kubernetes": kubernetes, "ssh": ssh, "mpi": mpi, "ray": ray}


def engine_s(contender: Contender, place: Path) -> float:
    place.mkdir()
    began = time.time()
    contender.alone(place)
    return max(path.stat().st_mtime for path in place.iterdir()) - began


def dtrain_s(contender: Contender, folder: Path) -> tuple[float, float]:
    """From the record of the submission, and from the command's start, to the last agent's joining."""
    folder.mkdir()
    (folder / "train.py").write_text("import time\ntime.sleep(600)\n")
    shape = {"nodes": 1 if contender.before else NODES, "procs_per_node": NODES if contender.before else 1}
    (folder / "cfg.json").write_text(json.dumps({"script": "train.py", "cluster": {**shape, **contender.cluster}}))
    run = folder / "run"
    words = ["run"] if contender.before else ["launch", "--detach"]
    argv = [*contender.before, DTRAIN, *words, str(folder / "cfg.json"), "--run-dir", str(run)]
    environ = {**os.environ, **contender.environ}
    began = time.time()
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=said, env=environ)
        _until(lambda: len(_events(run, "node_joined")) == shape["nodes"] or process.poll() not in (None, 0))
        found = _events(run, "node_joined")
        if len(found) < shape["nodes"]:
            raise RuntimeError((folder / "said").read_text())
        subprocess.run([DTRAIN, "cancel", str(run)], env=environ, stdout=said, stderr=said, check=False)
        process.wait()
    (submitted,) = _events(run, "submitted")
    return max(found) - submitted, max(found) - began


def _events(run: Path, kind: str) -> list[float]:
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [record["time"] for record in map(json.loads, lines) if record["type"] == kind]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], metavar="ENGINE", help="all of them")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'engine':8} {'alone':>7} {'dtrain':>7} {'more':>7} {'from the command on':>20}")
    over = []
    for name in args.engines or ENGINES:
        with ExitStack() as held:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="su-", ignore_cleanup_errors=True)))
            (folder / "engine").mkdir()
            try:
                contender = held.enter_context(ENGINES[name](folder / "engine"))
            except (ImportError, RuntimeError) as missing:
                print(f"{name:8} not here: {missing}")
                continue
            alone, ours, whole = [], [], []
            for number in range(args.rounds):
                alone.append(engine_s(contender, folder / f"alone-{number}"))
                submitted, command = dtrain_s(contender, folder / f"dtrain-{number}")
                ours.append(submitted)
                whole.append(command)
        own, found = statistics.median(alone), statistics.median(ours)
        print(f"{name:8} {own:7.2f} {found:7.2f} {found - own:+7.2f} {statistics.median(whole):20.2f}", flush=True)
        if found - own > GOAL_S:
            over.append(name)
    print(f"more than {GOAL_S:g} s above: {', '.join(over)}" if over else f"all within {GOAL_S:g} s of their engine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
