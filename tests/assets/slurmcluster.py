"""A real Slurm cluster of N nodes on this machine, for tests: as root, without systemd, in about two seconds.

    with slurm_cluster(root) as cluster:
        cluster.run("srun", "-N4", "hostname")
        cluster.kill_node("node3")          # a power failure

Each slurmd runs on a simulated computer (machines.py); slurmctld and munged on one more, `ctl`. This host is the submit
host: commands run here with SLURM_CONF set. Only /dev/shm and `local_disk` differ from node to node; every other file
is shared, as on a cluster's network disk. There is no accounting (no sacct) and no limit on memory or CPUs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import debian
import slurmconf
from debian import Missing
from machines import Machine, Network, wait_gone

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
# What Slurm's plugin loads.
PMIX = ("srun --mpi=pmix", ("libpmix-dev",), ("srun",), ("*/pmix2/lib/libpmix.so",))
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "setpriv", "unshare", "nsenter", "setsid", "bash")
READY_S = 60.0
POLL_S = 0.05


class SlurmCluster:
    """`root`: an empty folder with a short path (it holds Unix sockets). `gpus`: fake ones, a node.

    `settings` overrides lines of slurm.conf. Methods that wait raise TimeoutError.
    """

    def __init__(self, root: Path, *, nodes: int = 4, gpus: int = 0, settings: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.local_disk = root / "local"  # another folder on each node: disk_of(node), seen from here
        self._gpus = gpus
        self._settings = settings or {}
        self._network: Network | None = None
        self._machines: dict[str, Machine] = {}

    # The whole.

    def start(self) -> None:
        """Returns when every node is idle. Raises Missing where the parts are not to be had."""
        if os.geteuid() != 0:
            raise Missing(f"Slurm needs root, and: apt-get install --no-install-recommends {' '.join(PACKAGES)}")
        debian.install("Slurm", PACKAGES, PROGRAMS)
        with contextlib.suppress(Missing):  # few tests need it; slurmd looks for it when it starts
            debian.install(*PMIX)
        try:
            self._network = Network()
            self._write_files()
            controller = self._machine("ctl")
            controller.boot()
            self._network.open(controller)
            self._start_munge()
            self.start_controller()
            for name in self.nodes:
                self.boot_node(name)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leaves no process, network, mount or file."""
        for machine in reversed(self._machines.values()):
            machine.power_off()
        self._machines.clear()
        if self._network is not None:
            self._network.close()
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def restore(self) -> None:
        """Makes good whatever a test did to controller, nodes and network; jobs it leaves alone."""
        self.start_controller()
        for name in self.nodes:
            if not self._machines[name].pid:
                self.boot_node(name)
            else:
                self.heal(name)
                if not self._answers(name):
                    self.kill_slurmd(name)  # one that starts tells at once that it is there
                self.start_slurmd(name)

    def clear(self) -> list[int]:
        """restore(), cancels every job, and waits until every node is idle. Returns the cancelled jobs' ids."""
        self.restore()
        if left := self.jobs():
            self.run("scancel", *map(str, left))
        self.wait_idle()
        for home in (self.root / "home").iterdir():
            for entry in home.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return left

    # Commands on the submit host.

    def environ(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *argv: str, as_user: str | None = None) -> tuple[list[str], dict[str, str], Path | None]:
        """Command line, environment and working folder (None: this process's).

        An ordinary user (`nobody` is one that exists everywhere) works in home(user), with an environment of his own.
        """
        if as_user is None:
            return [*argv], {**os.environ, **self.environ()}, None
        user, home = pwd.getpwnam(as_user), self.home(as_user)
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG") or key.startswith("DTRAIN_")}
        own = {"HOME": str(home), "USER": as_user, "LOGNAME": as_user, "SHELL": "/bin/bash", "TMPDIR": str(home)}
        return [*become, *argv], {**kept, **own, **self.environ()}, home

    def run(
        self, *argv: str, as_user: str | None = None, env: Mapping[str, str] | None = None, check: bool = True,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """With `check` a failure raises RuntimeError with what it printed."""
        command, environ, folder = self.command(*argv, as_user=as_user)
        done = subprocess.run(
            command, env={**environ, **(env or {})}, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def home(self, user: str) -> Path:
        """The user's home on the shared disk, made at first use, private to him; empty again after clear()."""
        home, entry = self.root / "home" / user, pwd.getpwnam(user)
        if not home.exists():
            home.mkdir(mode=0o700)
            os.chown(home, entry.pw_uid, entry.pw_gid)
        return home

    def _ask(self, *argv: str) -> str:
        """What the command prints; again where slurmctld was too busy: MessageTimeout is short, machines are slow."""
        done = self.run(*argv, check=False)
        for _ in range(4):
            if "timed out" not in done.stderr:
                break
            done = self.run(*argv, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def words(self) -> str:
        """What Slurm says of its jobs and nodes now, and what its controller did last: for a test that has failed."""
        said = ""
        for line in ("squeue", "sinfo -N -l -p main", "scontrol show job", "scontrol -o show node"):
            done = self.run(*line.split(), check=False, timeout_s=30.0)
            said += f"--- {line}\n{done.stdout[-4000:]}{done.stderr[-500:]}"
        log = self.root / "log" / "slurmctld.log"
        return f"{said}--- {log.name}\n{log.read_text(errors='replace')[-6000:]}"

    # Jobs.

    def submit(self, *argv: str, as_user: str | None = None) -> int:
        """sbatch with these words; the job's id."""
        return int(self.run("sbatch", "--parsable", *argv, as_user=as_user).stdout.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """`scontrol -o show job`. Values with blanks are whole, unless a word in them looks like a key.

        Right after `sbatch` a job may be RUNNING before its script has begun.
        """
        return _fields(self._ask("scontrol", "-o", "show", "job", str(job_id)))

    def all_jobs(self) -> dict[int, dict[str, str]]:
        """Every job that was ever submitted, ended ones too."""
        lines = self._ask("scontrol", "-o", "show", "job").splitlines()
        return {int(line["JobId"]): line for line in map(_fields, lines) if "JobId" in line}

    def jobs(self) -> list[int]:
        """Those that wait or run; not those of which only the cleaning up is left."""
        lines = self._ask("squeue", "-h", "-o", "%A %T").splitlines()
        return [int(line.split()[0]) for line in lines if line.split()[1] != "COMPLETING"]

    def wait_job(self, job_id: int, *states: str, timeout_s: float = 60.0) -> dict[str, str]:
        """Waits for one of `states`, such as RUNNING."""
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(job_id))
            return job["JobState"] in states

        _wait(reached, timeout_s, lambda: f"job {job_id} is {job.get('JobState')} ({job.get('Reason')}), not {states}")
        return job

    # Nodes.

    def node(self, name: str) -> dict[str, str]:
        """`scontrol -o show node`."""
        return _fields(self._ask("scontrol", "-o", "show", "node", name))

    def states(self) -> dict[str, str]:
        """idle, mixed, allocated, completing, drained, down, down* (does not answer), ..."""
        lines = self._ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_saved(self, since: float, timeout_s: float = 60.0) -> None:
        """Waits until slurmctld has written down what it knows of its jobs: a crash forgets the rest."""
        saved = self.root / "state" / "job_state"
        _wait(lambda: saved.exists() and saved.stat().st_mtime > since, timeout_s, lambda: f"{saved} is not written")

    def wait_idle(self, timeout_s: float = READY_S) -> None:
        """Waits for every node; one that is drained, or that somebody set down, is taken back."""

        def idle() -> bool:
            states = self.states()
            for name, state in states.items():
                if state.startswith("drain") or state == "down":
                    self.resume(name)
            return set(states.values()) == {"idle"}

        _wait(idle, timeout_s, lambda: f"not every node is idle: {self.states()}, jobs {self.jobs()}{self._logs()}")

    def _answers(self, name: str) -> bool:
        return not self.states()[name].endswith("*")

    def wait_state(self, name: str, *states: str, timeout_s: float = 60.0) -> None:
        _wait(
            lambda: self.states()[name] in states, timeout_s, lambda: f"{name} is {self.states()[name]}, not {states}"
        )

    def drain(self, name: str, reason: str = "a test") -> None:
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", f"Reason={reason}")

    def resume(self, name: str) -> None:
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)

    def kill_node(self, name: str) -> None:
        """A power failure. Slurm calls it DOWN some five seconds later."""
        self._machines[name].power_off()

    def boot_node(self, name: str) -> None:
        """Idle again about a second later: wait_idle()."""
        assert self._network is not None
        machine = self._machine(name)
        machine.boot()
        self._network.plug(machine, self._place(name))
        self.start_slurmd(name)

    def kill_slurmd(self, name: str) -> None:
        """The daemon only: jobs on the node go on."""
        for pid in self._machines[name].named("slurmd"):
            _kill(pid, signal.SIGKILL)
            wait_gone(pid)

    def start_slurmd(self, name: str) -> None:
        if not self._machines[name].named("slurmd"):
            self._machines[name].run("slurmd", "-N", name)

    def cut(self, name: str) -> None:
        """The node goes on, nothing reaches it and nothing comes from it."""
        assert self._network is not None
        self._network.cut(self._place(name))

    def heal(self, name: str) -> None:
        assert self._network is not None
        self._network.heal(self._place(name))

    def on(self, name: str, *argv: str) -> str:
        """Runs a command on a node, as root and outside Slurm; what it prints."""
        return self._machines[name].run(*argv)

    def node_processes(self, name: str) -> dict[int, str]:
        """pid on this host -> command line of what runs on the node, Slurm's own daemon left out."""
        machine = self._machines[name]
        daemons = machine.named("slurmd")
        return {pid: line for pid, line in machine.processes().items() if pid not in daemons}

    def disk_of(self, name: str) -> Path:
        """Where the node's local disk lies on this host. It outlives a power failure."""
        return self.root / "disks" / name

    def address(self, name: str) -> str:
        assert self._network is not None
        return self._network.address(self._place(name))

    @property
    def host_address(self) -> str:
        """The submit host's, as nodes see it: a server that listens there can be reached from them."""
        assert self._network is not None
        return self._network.host_address

    # The controller.

    def start_controller(self) -> None:
        """Also wakes it up. Returns when it answers."""
        machine = self._machines["ctl"]
        for pid in machine.named("slurmctld"):
            _kill(pid, signal.SIGCONT)
        if not machine.named("slurmctld"):
            machine.run("slurmctld")
        _wait(lambda: self.run("scontrol", "ping", check=False).returncode == 0, READY_S,
              lambda: f"slurmctld does not answer{self._logs()}")  # fmt: skip

    def stop_controller(self, *, crash: bool = False) -> None:
        """Ends slurmctld; with `crash` it loses what it did not save in its last seconds."""
        for pid in self._machines["ctl"].named("slurmctld"):
            _kill(pid, signal.SIGKILL if crash else signal.SIGTERM)
            wait_gone(pid)

    def hang_controller(self) -> None:
        """Connections are accepted, no answer comes, until start_controller()."""
        for pid in self._machines["ctl"].named("slurmctld"):
            _kill(pid, signal.SIGSTOP)

    # Its parts.

    def _machine(self, name: str) -> Machine:
        if name not in self._machines:
            mounts = {self.root / "hosts": Path("/etc/hosts")}
            if Path("/etc/nsswitch.conf").exists():
                mounts[self.root / "nsswitch"] = Path("/etc/nsswitch.conf")
            if name in self.nodes:
                self.disk_of(name).mkdir(mode=0o777)
                self.disk_of(name).chmod(0o1777)
                mounts[self.disk_of(name)] = self.local_disk
            self._machines[name] = Machine(name, self.root / "run", mounts, self.environ())
        return self._machines[name]

    def _place(self, name: str) -> int:
        return self.nodes.index(name) + 1

    def _start_munge(self) -> None:
        key, run = self.root / "munge.key", self.root / "run"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._machines["ctl"].run(
            "munged", "--force", f"--key-file={key}", f"--socket={run}/munge", f"--pid-file={run}/munged.pid",
            f"--log-file={self.root}/log/munged.log", f"--seed-file={run}/munge.seed", "--num-threads=4",
        )  # fmt: skip

    def _write_files(self) -> None:
        assert self._network is not None
        self.root.chmod(0o755)
        for name in ("state", "spool", "log", "run", "disks", "local", "home", "dev"):
            (self.root / name).mkdir()
        hosts = {"127.0.0.1": "localhost", self._network.address(254): "ctl", self._network.host_address: "submit"}
        hosts |= {self.address(name): name for name in self.nodes}
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        if (names := Path("/etc/nsswitch.conf")).exists():
            # No name server can be reached from the nodes, and each miss would wait ten seconds for one.
            text = re.sub(r"(?m)^hosts:.*", "hosts: files", names.read_text())
            (self.root / "nsswitch").write_text(text)
        for number in range(self._gpus):
            # Slurm takes only a device; this one is another /dev/null.
            os.mknod(self.root / "dev" / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        addresses = {name: self.address(name) for name in self.nodes}
        files = slurmconf.render(
            self.root, f"dtrain{self._network.number}", self._network.address(254), addresses, gpus=self._gpus,
            settings=self._settings,
        )  # fmt: skip
        for name, text in files.items():
            (self.root / name).write_text(text)

    def _logs(self) -> str:
        files = sorted((self.root / "log").iterdir())
        return "".join(f"\n--- {path.name}\n{path.read_text(errors='replace')[-800:]}" for path in files)


@contextlib.contextmanager
def slurm_cluster(
    root: Path, *, nodes: int = 4, gpus: int = 0, settings: Mapping[str, str] | None = None
) -> Iterator[SlurmCluster]:
    """Raises Missing."""
    cluster = SlurmCluster(root, nodes=nodes, gpus=gpus, settings=settings)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def _fields(line: str) -> dict[str, str]:
    words = re.split(r"(?:^|\s)(?=[A-Z][A-Za-z/:]*=)", line.strip())
    return dict(word.split("=", 1) for word in words if "=" in word)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(ready: Callable[[], bool], timeout_s: float, words: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(words())
        time.sleep(POLL_S)
