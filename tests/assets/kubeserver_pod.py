"""One pod of the tests' Kubernetes as processes: its sandbox, a simulated computer with the pod's name and address, and
in it each container with a root, process numbers and devices of its own.

Any image is this machine's files, read-only, with empty /tmp, /home and the like, as an image has them: what a
container is to see of this machine it has to mount. The Python that runs the tests is in every image.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from machines import Machine, wait_gone

REPO = Path(__file__).resolve().parent.parent.parent
HIDDEN = ("/tmp", "/var/tmp", "/root", "/home", "/run")
# https://github.com/containerd/containerd: what a container's root has where nothing else is said.
CAPABILITIES = (
    "chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid", "setfcap", "setpcap",
    "net_bind_service", "sys_chroot", "kill", "audit_write",
)  # fmt: skip

# pid 1 of a container until it becomes the container's command. Arguments: descriptor to tell on; number of hidden
# folders and these; number of mounts and for each source, target, ro or rw; ro or rw for the root; working folder;
# setpriv's options up to `--`; the command. The whole machine lies at /media/host meanwhile, as the
# hidden folders hold sources.
_BECOME = r"""
set -eu
told=$1; shift
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /media; mkdir /media/host; mount --rbind / /media/host
hidden=$1; shift
for ((i = 0; i < hidden; i++)); do mount -t tmpfs -o mode=755 tmpfs "$1"; shift; done
chmod 1777 /tmp /var/tmp
mount -t tmpfs -o mode=755 tmpfs /dev; mkdir /dev/shm /dev/pts
for name in null zero full random urandom tty; do : >/dev/$name; mount --bind /media/host/dev/$name /dev/$name; done
mount --bind /media/host/dev/shm /dev/shm
for name in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s /proc/self/${name#*:} /dev/${name%%:*}; done
mounts=$1; shift
for ((i = 0; i < mounts; i++)); do
  if [ -d "/media/host$1" ]; then mkdir -p "$2"; else mkdir -p "${2%/*}"; [ -e "$2" ] || : >"$2"; fi
  mount --rbind "/media/host$1" "$2"
  [ "$3" = rw ] || mount -o remount,bind,ro "$2"
  shift 3
done
umount -l /media
mount -t proc proc /proc
mount -o remount,bind,ro /
if [ "$1" = ro ]; then for name in /tmp /var/tmp /root /home /run; do mount -o remount,bind,ro $name; done; fi
cd "$2" || { echo no >&"$told"; exit 128; }
shift 2
options=()
while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
PATH=$KUBESERVER_PATH
unset KUBESERVER_PATH OLDPWD
type -P -- "$1" >/dev/null || { echo "exec: \"$1\": executable file not found in \$PATH"; echo no >&"$told"; exit 128; }
echo started >&"$told"; exec {told}>&-
exec /usr/bin/env -u SHLVL -u PWD -u _ /usr/bin/setpriv "${options[@]}" -- "$@"
"""


# Its parent: unshare's own --fork (util-linux 2.38) can't tell that its child was killed by SIGKILL.
_WAIT = 'exec {said}>&2 2>/dev/null; "$@" 2>&$said {said}>&-; code=$?; exit $code'


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a container is to run, and as whom."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    mounts: Sequence[Mount]
    cwd: str
    uid: int
    gid: int
    groups: Sequence[int] = ()
    capabilities: Sequence[str] = CAPABILITIES
    no_new_privileges: bool = False
    read_only_root: bool = False

    def options(self) -> list[str]:
        bounds = ",".join(["-all", *(f"+{name}" for name in self.capabilities)])
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        found = [f"--reuid={self.uid}", f"--regid={self.gid}", groups, f"--bounding-set={bounds}", "--inh-caps=-all"]
        return [*found, *(["--no-new-privs"] if self.no_new_privileges else [])]


def image_mounts() -> list[Mount]:
    """The tests' Python and this repository, wherever they lie in what is hidden."""
    packages = [Path(path) for path in sys.path if Path(path).name == "site-packages" and Path(path).is_dir()]
    paths = {Path(sys.prefix), Path(sys.base_prefix), REPO, *packages}
    hidden = [path.resolve() for path in paths if any(path.resolve().is_relative_to(top) for top in HIDDEN)]
    outer = [path for path in hidden if not any(path != other and path.is_relative_to(other) for other in hidden)]
    return [Mount(source=path, target=str(path), read_only=True) for path in sorted(set(outer))]


@dataclass(slots=True)
class Container:
    """One start of a container in a sandbox."""

    mark: Path  # where its start is told
    log: Path
    popen: subprocess.Popen[bytes] | None = None

    def start(self, sandbox: Machine, process: Process) -> None:
        """Returns when the command runs, or could not be run."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        told = os.open(self.mark, os.O_WRONLY | os.O_CREAT)  # opened out here: in there its folder is hidden
        mounts = [word for m in process.mounts for word in (str(m.source), m.target, "ro" if m.read_only else "rw")]
        words = [
            str(told), str(len(HIDDEN)), *HIDDEN, str(len(process.mounts)), *mounts,
            "ro" if process.read_only_root else "rw", process.cwd, *process.options(), "--", *process.argv,
        ]  # fmt: skip
        environ = {**process.environ, "KUBESERVER_PATH": process.environ.get("PATH", "")}
        own = [_program(name) for name in ("unshare", "bash")]
        become = [own[1], "-p", "-c", _BECOME, "container", *words]
        inner = [own[0], "--mount", "--pid", own[1], "-p", "-c", _WAIT, "waits", *become]
        enter = [_program("nsenter"), *sandbox.command(*inner)[1:]]
        with open(self.log, "ab") as output:
            self.popen = subprocess.Popen(
                enter, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, cwd="/",
                start_new_session=True, pass_fds=[told],
            )  # fmt: skip
        os.close(told)
        while self.popen.poll() is None and self.could_not_start:
            time.sleep(0.005)

    @property
    def could_not_start(self) -> bool:
        return not self.mark.exists() or self.mark.read_text() != "started\n"

    @property
    def exit_code(self) -> int | None:
        """As a shell would say it; None: it runs."""
        assert self.popen is not None
        code = self.popen.poll()
        return None if code is None else 128 - code if code < 0 else code

    def signal(self, number: signal.Signals) -> None:
        """To the container's pid 1, which ignores what it has no handler for, SIGKILL excepted."""
        assert self.popen is not None
        with contextlib.suppress(psutil.Error, ProcessLookupError, IndexError):
            first = psutil.Process(self.popen.pid).children()[0].children()[0]
            os.kill(first.pid, number)

    def processes(self) -> dict[int, str]:
        """pid on this host -> command line, pid 1 first."""
        found = {}
        with contextlib.suppress(psutil.Error, IndexError):
            assert self.popen is not None
            first = psutil.Process(self.popen.pid).children()[0].children()[0]
            for process in (first, *first.children(recursive=True)):
                found[process.pid] = " ".join(process.cmdline())
        return found

    def kill(self) -> None:
        if self.popen is None:
            return
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(5)
            return
        self.popen.kill()
        self.popen.wait(10)


@dataclass(slots=True)
class Sandbox:
    """The pod's own computer. `hosts`: the file that its names are looked up in, changed in place."""

    folder: Path
    hostname: str
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        mounts = {self.hosts: Path("/etc/hosts")}
        self.hosts.write_text("127.0.0.1 localhost\n")
        if (names := Path("/etc/nsswitch.conf")).exists():
            # The tests' own files are all the name service: a miss must not wait for a name server.
            lines = [line for line in names.read_text().splitlines() if not line.startswith("hosts:")]
            (self.folder / "nsswitch").write_text("\n".join([*lines, "hosts: files"]) + "\n")
            mounts[self.folder / "nsswitch"] = names
        self.machine = Machine(self.hostname, self.folder, mounts, {})

    @property
    def hosts(self) -> Path:
        return self.folder / "hosts"

    def boot(self) -> None:
        self.machine.boot()
        # https://kubernetes.io/docs/concepts/storage/volumes/#emptydir; a runtime's own /dev/shm has 64 MiB.
        self.machine.run("mount", "-o", "remount,size=64m", "/dev/shm")

    def power_off(self) -> None:
        pid = self.machine.pid
        self.machine.power_off()
        if pid:
            wait_gone(pid)

    def tell_names(self, text: str) -> None:
        """Without a moment in which the file is empty: what follows a shorter text is blank."""
        size = self.hosts.stat().st_size
        with open(self.hosts, "r+b") as file:
            file.write(text.encode().ljust(size, b"\n"))


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None
    return found
