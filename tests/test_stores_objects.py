"""What is peculiar to stores behind a network: refusals in words, credentials, lost answers, uploads left behind."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3servers import S3Server, environment, moto, rclone

from dtrain.cluster.errors import AlreadyExists, StorageError, UsageError
from dtrain.cluster.storage import open_storage
from dtrain.launcher import cli
from dtrain.runtime.stores import tickets
from dtrain.runtime.stores.client import ObjectClient
from dtrain.runtime.stores.limits import MIB, Limits
from dtrain.runtime.stores.objects import ObjectStorage
from dtrain.runtime.stores.place import parse_place

pytestmark = pytest.mark.slow

BUCKET = "checkpoints"
HASTY = Limits(connect_s=1, silent_s=1, request_s=2, retry_s=1, max_retries=1, first_wait_s=0.01)


@pytest.fixture(scope="module")
def emulator() -> Iterator[S3Server]:
    with moto() as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@contextmanager
def answering(status: int, body: str) -> Iterator[S3Server]:
    """A server that gives the same answer to everything; status 0: none at all, and the connection stays open."""
    closed = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            if status == 0:
                closed.wait(30)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield S3Server(name="canned", endpoint=f"http://127.0.0.1:{server.server_port}")
        finally:
            closed.set()
            server.shutdown()
            thread.join()


def code(name: str) -> str:
    return f"<Error><Code>{name}</Code><Message>as servers put it</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            403,
            code("AccessDenied"),
            r"do not have the right.*listing and deleting in bucket .*AccessDenied",
        ),
        (403, code("RequestTimeTooSkewed"), r"clock .*differ\. Set the clock"),
        (403, code("InvalidAccessKeyId"), "access key is not known.*AWS_ACCESS_KEY_ID"),
        (403, code("SignatureDoesNotMatch"), "secret key does not belong.*AWS_SECRET_ACCESS_KEY"),
        (400, code("ExpiredToken"), "credentials have expired"),
        (301, code("PermanentRedirect"), "another region.*AWS_REGION"),
        (404, code("NoSuchBucket"), f"there is no bucket {BUCKET}.*checkpoint.url"),
        (404, "<html>nginx</html>", "Is it an object store.*AWS_ENDPOINT_URL"),
        (507, "", "store is full.*checkpoint.keep"),
        (503, code("SlowDown"), "too busy, also after several tries"),
        (418, "<x>{teapot}</x>", r"418 I'm a teapot: <x>\{teapot\}"),
    ],
)
def test_refusals_in_words(status: int, body: str, words: str) -> None:
    with answering(status, body) as server, server.environment():
        store = ObjectStorage(f"s3://{BUCKET}/x", limits=HASTY)
        for act in (
            lambda: store.put_if_absent("a", b""),
            lambda: store.upload("a", [memoryview(b"x")], 1),
            lambda: store.upload("a", [memoryview(bytes(20 * MIB))], 20 * MIB),
            lambda: list(store.list("")),
            lambda: store.list_dirs(""),
        ):
            with pytest.raises(StorageError, match=words) as caught:
                act()
            assert server.endpoint in str(caught.value)
        with pytest.raises(UsageError, match=words):
            store.check_writable(5)


def test_a_missing_bucket_is_no_missing_object(emulator: S3Server) -> None:
    with emulator.environment():
        store = open_storage("s3://no-such-bucket/x")
        for act in (lambda: store.get("a"), lambda: store.read_into("a", 0, memoryview(bytearray(1)))):
            with pytest.raises(StorageError, match="there is no bucket no-such-bucket"):
                act()


@pytest.mark.parametrize("fsspec", ["", "fsspec+"])
@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_a_server_that_is_not_there(kind: str, fsspec: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if kind == "nobody":
            listener.close()
        with S3Server(name=kind, endpoint=f"http://127.0.0.1:{port}").environment():
            began = time.monotonic()
            with pytest.raises(UsageError, match=r"can't be reached|not answer|Could not connect|timeout"):
                open_storage(f"{fsspec}s3://{BUCKET}/x").check_writable(3)
            assert time.monotonic() - began < 8


def test_a_launch_tries_the_store_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], emulator: S3Server) -> None:
    config = tmp_path / "cfg.yaml"
    config.write_text(
        "model: {_target_: torch.nn.Linear, in_features: 2, out_features: 2}\n"
        "data: {train: {_target_: torch.nn.Identity}, batch_size: 4}\n"
        "optimizer: {_target_: torch.optim.SGD, lr: 0.1}\n"
        "train: {steps: 4}\n"
        "checkpoint: {url: 's3://no-such-bucket/x'}\n"
    )
    with emulator.environment():
        assert cli.main(["launch", str(config)]) == 2
    said = capsys.readouterr().err
    assert "cfg.yaml:5: checkpoint.url: can't write a small object" in said
    assert "there is no bucket no-such-bucket. Make it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cfg.yaml"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:hunter2@bucket/x", "a URL with a password"),
        ("sftp://me:hunter2@host/x", "a URL with a password"),
        ("fsspec+s3://key:hunter2@bucket/x", "a URL with a password"),
        ("s3:///x", "names no bucket"),
        ("az://host:80/x", "names no container"),
        ("s3://bucket/x?endpoint=y", "nothing may follow"),
        ("gs://bucket/a/../b", "can't be empty"),
        ("gopher://x", "no store for gopher"),
        ("sftp://host/x", "sftp:// needs a package"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        open_storage(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("package", ["obstore", "botocore"])
def test_a_missing_package_is_named(package: str) -> None:
    program = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from dtrain.cluster.errors import UsageError\n"
        "from dtrain.cluster.storage import open_storage\n"
        "try: open_storage('s3://bucket/x')\n"
        "except UsageError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith(f"{package}, which is not installed: pip install 'dtrain[s3]'")


def test_credentials_and_endpoint_from_a_profile(tmp_path: Path, gateway: S3Server, url: str) -> None:
    folder = Path.home() / ".aws"
    folder.mkdir()
    (folder / "config").write_text(f"[profile lab]\nregion = eu-central-1\nendpoint_url = {gateway.endpoint}\n")
    (folder / "credentials").write_text(
        f"[lab]\naws_access_key_id = {gateway.key}\naws_secret_access_key = {gateway.secret}\n"
    )
    with environment({"AWS_PROFILE": "lab"}):
        open_storage(url).put_if_absent("a", b"x")
    with gateway.environment():
        assert open_storage(url).get("a") == b"x"


def test_no_credentials_anywhere(url: str) -> None:
    with environment({"AWS_EC2_METADATA_DISABLED": "true"}):
        store = open_storage(url)  # asks nothing yet
        with pytest.raises(UsageError, match=r"no credentials for S3 were found.*AWS_PROFILE"):
            store.get("a")
    with environment({"AWS_PROFILE": "nobody"}), pytest.raises(UsageError, match=r"nobody.*not be found"):
        open_storage(url).get("a")


@pytest.mark.parametrize(("name", "value"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
def test_wrong_credentials(gateway: S3Server, url: str, name: str, value: str) -> None:
    with environment({**gateway.variables(), name: value}):
        with pytest.raises(UsageError, match=f"Check {name}"):
            open_storage(url).check_writable(15)
        with pytest.raises(StorageError, match=f"Check {name}"):
            open_storage(url).get("a")


def test_whether_a_store_can_is_noticed(
    emulator: S3Server, gateway: S3Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for server, tickets_decide in ((emulator, False), (gateway, True)):
        with server.environment():
            store = open_storage(url)
            store.put_if_absent("a", b"")
            store.put_if_absent("b", b"")
        assert caplog.text.count("tickets decide instead") == tickets_decide
        listed = server.client().list_objects_v2(Bucket=BUCKET)["Contents"]
        assert not [found["Key"] for found in listed if "/." in found["Key"]]  # no probe and no ticket is left


class AnswerLost(ObjectClient):
    """The answer to a create is lost on the way, and what is asked again finds the object."""

    def create(self, key: str, data: bytes) -> bool:
        super().create(key, data)
        return super().create(key, data)


def test_a_create_whose_answer_was_lost_is_a_success(emulator: S3Server, url: str) -> None:
    with emulator.environment():
        store = ObjectStorage(url)
        store.put_if_absent("a", b"first")
        store._client = AnswerLost(parse_place(url), Limits())
        store.put_if_absent("b", b"mine")
        assert store.get("b") == b"mine"
        with pytest.raises(AlreadyExists):
            store.put_if_absent("a", b"second")
        assert store.get("a") == b"first"


def test_uploads_that_were_left_behind_are_aborted(emulator: S3Server, url: str) -> None:
    client, prefix = emulator.client(), url.removeprefix(f"s3://{BUCKET}/")
    for key in (f"{prefix}/step-1/a", f"{prefix}/step-2/b", f"{prefix}-other/c"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    with emulator.environment():
        store = open_storage(url)
        assert store.discard_uploads("", before=1.0) == 0  # moto dates all of them to 2010
        assert store.discard_uploads("step-1/", before=time.time() + 60) == 1
        assert open_storage(f"fsspec+{url}").discard_uploads("", before=time.time() + 60) == 1
    left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{prefix}-other/c"]
    client.abort_multipart_upload(Bucket=BUCKET, Key=left[0]["Key"], UploadId=left[0]["UploadId"])


WRITES_ON = """
import sys, time
from dtrain.cluster.storage import open_storage

def parts():
    for _ in range(3):
        yield memoryview(bytes(16 << 20))
    time.sleep(600)

open_storage(sys.argv[1]).upload("step-1/a", parts(), 64 << 20)
"""


def test_a_writer_that_is_killed_leaves_nothing_to_be_seen(emulator: S3Server, url: str) -> None:
    with emulator.environment():
        writer = subprocess.Popen([sys.executable, "-c", WRITES_ON, url])
        try:
            where = {"Bucket": BUCKET, "Prefix": url.partition(f"{BUCKET}/")[2]}
            while "Uploads" not in emulator.client().list_multipart_uploads(**where):
                assert writer.poll() is None
                time.sleep(0.05)
        finally:
            writer.kill()
            writer.wait()
        store = open_storage(url)
        assert list(store.list("")) == []
        assert store.list_dirs("") == []
        assert store.stat("step-1/a") is None
        assert store.discard_uploads("", before=time.time() + 60) == 1
        assert store.discard_uploads("", before=time.time() + 60) == 0


def test_one_store_may_be_read_while_another_is_written(emulator: S3Server, url: str) -> None:
    """obstore may not be called from an iterator that it draws on."""
    content = os.urandom(40 * MIB)
    with emulator.environment():
        store = open_storage(url)
        store.upload("a", [memoryview(content)], len(content))

        def parts() -> Iterator[memoryview]:
            for begin in range(0, len(content), 8 * MIB):
                target = bytearray(8 * MIB)
                store.read_into("a", begin, memoryview(target))
                yield memoryview(target)

        store.upload("b", parts(), len(content))
        assert store.get("b") == content
        whole = bytearray(len(content))
        small = ObjectStorage(url, limits=replace(Limits(), part_bytes=1 * MIB, concurrency=3))
        small.read_into("b", 0, memoryview(whole))  # many ranges, several groups
        assert whole == content


class Shelf:
    """A store in memory whose clock stands still until it is moved."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.now = 1000.0

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = (data, self.now)

    def get(self, key: str) -> bytes | None:
        return self.objects[key][0] if key in self.objects else None

    def remove(self, key: str) -> None:
        self.objects.pop(key, None)

    def listing(self, directory: str) -> Iterator[Any]:
        from dtrain.cluster.storage import ObjectInfo

        for key, (data, at) in sorted(self.objects.items()):
            if key.startswith(f"{directory}/"):
                yield ObjectInfo(key=key, size_bytes=len(data), modified_at=at)


@pytest.mark.parametrize("name", ["0", "z"])  # smaller and larger than any of ours
def test_another_ticket_is_waited_for_until_it_is_stale(name: str) -> None:
    shelf, waits = Shelf(), 0
    shelf.put(f".tickets/a/{name}", b"somebody who died")

    def sleep(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 5:
            assert "a" not in shelf.objects
            shelf.now += tickets.STALE_S + 1
            for key in [key for key in shelf.objects if key.startswith(".tickets") and not key.endswith(f"/{name}")]:
                shelf.objects[key] = (b"", shelf.now)  # ours is as young as before

    tickets.put_if_absent(shelf, "a", b"mine", sleep=sleep)
    assert waits >= 5
    assert {key: data for key, (data, _) in shelf.objects.items()} == {"a": b"mine"}


def test_a_write_that_fails_keeps_its_ticket() -> None:
    """The bytes may still be on their way: nobody else may have a turn before they must have come."""

    class Broken(Shelf):
        def put(self, key: str, data: bytes) -> None:
            if key == "a":
                raise StorageError("the line is dead")
            super().put(key, data)

    shelf = Broken()
    with pytest.raises(StorageError, match="line is dead"):
        tickets.put_if_absent(shelf, "a", b"mine")
    assert [key for key in shelf.objects if key.startswith(".tickets/a/")]


def test_a_listing_that_lags_is_no_base_for_tickets() -> None:
    class Lagging(Shelf):
        def listing(self, directory: str) -> Iterator[Any]:
            return iter(())

    shelf = Lagging()
    with pytest.raises(StorageError, match="does not show what was just written"):
        tickets.put_if_absent(shelf, "a", b"mine")
    assert shelf.objects == {}
