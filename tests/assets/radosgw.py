"""Ceph's S3 gateway on this machine: a real server with a monitor, one disk (a file) and the gateway, without systemd.

Needs root and Debian's ceph-mon, ceph-osd and radosgw, which it installs where apt-get can. About 0.5 GB of memory and
20 s to start, so a session starts it once. What it does not need is left out: no manager, one replica.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import debian
from freeports import free_ports
from s3servers import KEY, SECRET, S3Server

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
START_S = 120.0

CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {root}/keyring
run_dir = {root}
admin_socket = {root}/$name.asok
log_file = {root}/log/$name.log
debug_ms = 0
public_network = 127.0.0.0/8
setuser_match_path = /nonexistent
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_osd_full_ratio = .97
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
bluestore_block_size = 21474836480
bluestore_fsck_on_mount = false
osd_memory_target = 1073741824
osd_class_load_list = *
osd_class_default_list = *
[mon]
mon_data = {root}/mon
mon_initial_members = a
[osd]
osd_data = {root}/osd
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
rgw_data = {root}/rgw
keyring = {root}/keyring
rgw_enable_usage_log = false
rgw_enable_ops_log = false
debug_rgw = 0
rgw_gc_obj_min_wait = 1
rgw_gc_processor_period = 5
rgw_gc_processor_max_time = 60
"""


def install() -> None:
    """Raises debian.Missing."""
    if os.geteuid() != 0:
        raise debian.Missing(
            f"Ceph's gateway needs root, and: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    debian.install("Ceph's gateway", PACKAGES, PROGRAMS)


@contextlib.contextmanager
def radosgw(root: Path) -> Iterator[S3Server]:
    """`root`: an empty directory with a short path (it holds Unix sockets). Raises debian.Missing."""
    install()
    ceph = _Ceph(root)
    with contextlib.ExitStack() as stack:
        ceph.prepare()
        ceph.start(stack, "ceph-mon", "-i", "a")
        ceph.wait("the monitor", lambda: ceph.asks("-s"))
        ceph.make_disk()
        ceph.start(stack, "ceph-osd", "-i", "0")
        ceph.wait("the disk", lambda: "1 up" in ceph.answer("osd", "stat"))
        ceph.start(stack, "radosgw", "-n", "client.rgw")
        ceph.wait("the gateway", ceph.gateway_answers)
        ceph.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", f"--access-key={KEY}",
                 f"--secret-key={SECRET}")  # fmt: skip
        yield S3Server(name="radosgw", endpoint=ceph.endpoint)


class _Ceph:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.mon_v2, self.mon_v1, self.rgw = free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.rgw}"
        self.fsid = str(uuid.uuid4())
        self.environ = {**os.environ, "CEPH_CONF": str(root / "ceph.conf"), "LC_ALL": "C.UTF-8"}

    def prepare(self) -> None:
        """Config, keys, and the monitor's map and store."""
        for name in ("mon", "osd", "log", "rgw"):
            (self.root / name).mkdir()
        (self.root / "ceph.conf").write_text(
            CONFIG.format(root=self.root, fsid=self.fsid, mon_v2=self.mon_v2, mon_v1=self.mon_v1, rgw=self.rgw)
        )
        keyring = str(self.root / "keyring")
        self.run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw", "osd.0"):
            rights = [word for part in ("mon", "osd", "mgr") for word in ("--cap", part, "allow *")]
            self.run("ceph-authtool", keyring, "--gen-key", "-n", name, *rights)
        for name in ("rgw", "osd"):
            shutil.copy(keyring, self.root / name / "keyring")
        address = f"[v2:127.0.0.1:{self.mon_v2},v1:127.0.0.1:{self.mon_v1}]"
        self.run("monmaptool", "--create", "--addv", "a", address, "--fsid", self.fsid, str(self.root / "monmap"))
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self.root / "monmap"), "--keyring", keyring)

    def make_disk(self) -> None:
        disk = str(uuid.uuid4())
        self.run("ceph", "osd", "new", disk)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environ, timeout=timeout_s, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")
        return done.stdout

    def start(self, stack: contextlib.ExitStack, program: str, *options: str) -> None:
        """A daemon that ends with the block, and with this process however that ends."""
        command = ["setpriv", "--pdeathsig", "KILL", program, "-f", *options]
        with open(self.root / "log" / f"{program}.out", "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environ,
                start_new_session=True,
            )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)

    def answer(self, *words: str) -> str:
        try:
            return self.run("ceph", *words, timeout_s=10)
        except (RuntimeError, subprocess.TimeoutExpired):
            return ""

    def asks(self, *words: str) -> bool:
        return self.answer(*words) != ""

    def gateway_answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()  # an answer is an answer
        except OSError:
            return False
        return True

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            if time.monotonic() > deadline:
                ends = "\n".join(path.read_text(errors="replace")[-600:] for path in (self.root / "log").iterdir())
                raise RuntimeError(f"{what} of Ceph did not come up within {START_S:.0f} s\n{ends}")
            time.sleep(0.3)
