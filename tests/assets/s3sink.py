"""An S3 endpoint in memory that is quicker than any real server, for measuring clients: large bodies are counted and
discarded, small ones are kept, so that manifests can be read back.

    python s3sink.py [--keep-below BYTES]     prints its port, and serves until its standard input ends

A thread a connection, bodies received into one buffer each. It knows no credentials. Enough of S3 for obstore, s3fs and
botocore: objects, ranges, conditional put, multipart, copies, listings, deletes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUFFER_BYTES = 1 << 20
PAGE = 1000
ISO = "%Y-%m-%dT%H:%M:%S.000Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """`data` is None where it was discarded."""

    size: int
    data: bytes | None
    etag: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    key: str  # "bucket/a/b"
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Stored

    @property
    def bucket(self) -> str:
        return self.key.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None  # of the body, where it is not sent (HEAD)


class Sink:
    def __init__(self, keep_below: int) -> None:
        self.keep_below = keep_below
        self._objects: dict[str, Stored] = {}
        self._uploads: dict[str, tuple[str, float, dict[int, Stored]]] = {}  # id -> key, begun at, parts
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Reply:
        with self._lock:
            return self._route(request)

    def _route(self, request: Request) -> Reply:
        query = request.query
        match request.method:
            case "PUT" if "/" not in request.key:
                return Reply()  # a bucket
            case "PUT" if "partNumber" in query:
                return self._part(request)
            case "PUT" if "x-amz-copy-source" in request.headers:
                return self._copy(request)
            case "PUT":
                return self._put(request)
            case "POST" if "uploads" in query:
                return self._begin(request)
            case "POST" if "uploadId" in query:
                return self._complete(request)
            case "POST" if "delete" in query:
                return self._delete_many(request)
            case "DELETE" if "uploadId" in query:
                return Reply(status=204 if self._uploads.pop(query["uploadId"], None) else 404)
            case "DELETE":
                self._objects.pop(request.key, None)
                return Reply(status=204)
            case "GET" if "/" not in request.key:
                return self._list_uploads(request) if "uploads" in query else self._list(request)
            case "GET" | "HEAD" if "/" in request.key:
                return self._get(request)
            case "HEAD":
                return Reply()  # a bucket
        return _refuse(405, "MethodNotAllowed")

    def _put(self, request: Request) -> Reply:
        if request.headers.get("if-none-match") == "*" and request.key in self._objects:
            return _refuse(412, "PreconditionFailed")
        self._objects[request.key] = request.body
        return Reply(headers={"ETag": request.body.etag})

    def _copy(self, request: Request) -> Reply:
        found = self._objects.get(unquote(request.headers["x-amz-copy-source"]).lstrip("/"))
        if found is None:
            return _refuse(404, "NoSuchKey")
        self._objects[request.key] = found
        when = time.strftime(ISO, time.gmtime(found.at))
        return _xml("CopyObjectResult", f"<ETag>{found.etag}</ETag><LastModified>{when}</LastModified>")

    def _begin(self, request: Request) -> Reply:
        upload = f"upload-{next(self._ids)}"
        self._uploads[upload] = (request.key, time.time(), {})
        key = escape(request.key.partition("/")[2])
        names = f"<Bucket>{request.bucket}</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId>"
        return _xml("InitiateMultipartUploadResult", names)

    def _part(self, request: Request) -> Reply:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None:
            return _refuse(404, "NoSuchUpload")
        upload[2][int(request.query["partNumber"])] = request.body
        return Reply(headers={"ETag": request.body.etag})

    def _complete(self, request: Request) -> Reply:
        upload = self._uploads.pop(request.query["uploadId"], None)
        if upload is None:
            return _refuse(404, "NoSuchUpload")
        parts = [part for _, part in sorted(upload[2].items())]
        whole = all(part.data is not None for part in parts)
        data = b"".join(part.data or b"" for part in parts) if whole else None
        stored = Stored(size=sum(part.size for part in parts), data=data, etag=f'"{len(parts)}-{next(self._ids)}"')
        self._objects[request.key] = stored
        return _xml("CompleteMultipartUploadResult", f"<ETag>{stored.etag}</ETag>")

    def _delete_many(self, request: Request) -> Reply:
        text = (request.body.data or b"").decode()
        keys = [part.partition("</Key>")[0] for part in text.split("<Key>")[1:]]
        for key in keys:
            self._objects.pop(f"{request.bucket}/{unescape(key)}", None)
        return _xml("DeleteResult", "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys))

    def _get(self, request: Request) -> Reply:
        found = self._objects.get(request.key)
        if found is None:
            return _refuse(404, "NoSuchKey")
        headers = {"ETag": found.etag, "Last-Modified": formatdate(found.at, usegmt=True), "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Reply(headers=headers, length=found.size)
        if found.data is None:
            return _refuse(500, "Discarded")
        if "range" not in request.headers:
            return Reply(headers=headers, body=found.data)
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        begin = int(first) if first else max(0, found.size - int(last))
        end = min(int(last) + 1, found.size) if first and last else found.size
        if begin >= found.size:
            return _refuse(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{found.size}"
        return Reply(status=206, headers=headers, body=found.data[begin:end])

    def _list(self, request: Request) -> Reply:
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        entries = list(itertools.islice(self._entries(request.bucket, prefix, delimiter, after), PAGE + 1))
        more = len(entries) > PAGE
        content = "".join(text for _, text in entries[:PAGE])
        token = f"<NextContinuationToken>{escape(entries[PAGE - 1][0])}</NextContinuationToken>" if more else ""
        head = (
            f"<Name>{request.bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(entries[:PAGE])}</KeyCount>"
        )
        flag = f"<MaxKeys>{PAGE}</MaxKeys><IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        return _xml("ListBucketResult", head + flag + token + content)

    def _entries(self, bucket: str, prefix: str, delimiter: str, after: str) -> Iterator[tuple[str, str]]:
        """(key or common prefix, its XML), in order."""
        last = ""
        for full, found in sorted(self._objects.items()):
            owner, _, key = full.partition("/")
            if owner != bucket or not key.startswith(prefix) or key <= after:
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                common = prefix + rest[: rest.index(delimiter) + len(delimiter)]
                if common not in (last, after):
                    last = common
                    yield common, f"<CommonPrefixes><Prefix>{escape(common)}</Prefix></CommonPrefixes>"
                continue
            when = time.strftime(ISO, time.gmtime(found.at))
            yield (
                key,
                (
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{found.etag}</ETag>"
                    f"<Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                ),
            )

    def _list_uploads(self, request: Request) -> Reply:
        content = ""
        for upload, (full, at, _) in self._uploads.items():
            owner, _, key = full.partition("/")
            if owner == request.bucket and key.startswith(request.query.get("prefix", "")):
                when = time.strftime(ISO, time.gmtime(at))
                names = f"<Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
                content += f"<Upload>{names}<Initiated>{when}</Initiated></Upload>"
        return _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{content}")


class Connection:
    """One client: requests are read and answered in turn."""

    def __init__(self, connection: socket.socket, sink: Sink) -> None:
        self._socket = connection
        self._sink = sink
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._ahead = b""  # received and not yet used

    def serve(self) -> None:
        with self._socket:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while (head := self._read_head()) is not None:
                    request = self._read_request(head)
                    self._send(request, self._sink.answer(request))
                    if request.headers.get("connection", "").lower() == "close":
                        return
            except OSError:
                return

    def _read_head(self) -> bytes | None:
        """None where the client has closed."""
        while b"\r\n\r\n" not in self._ahead:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                return None
            self._ahead += self._buffer[:count]
        head, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        return head

    def _read_request(self, head: bytes) -> Request:
        line, *fields = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (entry.partition(":") for entry in fields)}
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._read_body(int(headers.get("content-length", 0)))
        return Request(method=method, key=unquote(parts.path).strip("/"), query=query, headers=headers, body=body)

    def _read_body(self, size: int) -> Stored:
        kept = [self._ahead[:size]]
        self._ahead = self._ahead[size:]
        left, keep = size - len(kept[0]), size < self._sink.keep_below
        while left:
            count = self._socket.recv_into(self._buffer, min(left, BUFFER_BYTES))
            if count == 0:
                raise ConnectionError("the client went away")
            left -= count
            if keep:
                kept.append(bytes(self._buffer[:count]))
        data = b"".join(kept) if keep else None
        # Clients compare small bodies with their MD5; what is discarded gets any tag.
        tag = hashlib.md5(data or b"", usedforsecurity=False).hexdigest()
        return Stored(size=size, data=data, etag=f'"{tag}"')

    def _send(self, request: Request, reply: Reply) -> None:
        body = b"" if request.method == "HEAD" else reply.body
        length = len(reply.body) if reply.length is None else reply.length
        lines = [
            f"HTTP/1.1 {reply.status} X",
            f"Content-Length: {length}",
            *(f"{k}: {v}" for k, v in reply.headers.items()),
        ]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def _xml(name: str, content: str, status: int = 200) -> Reply:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{content}</{name}>'
    return Reply(status=status, body=text.encode(), headers={"Content-Type": "application/xml"})


def _refuse(status: int, code: str) -> Reply:
    return _xml("Error", f"<Code>{code}</Code><Message>{code}</Message>", status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-below", type=int, default=1 << 20, metavar="BYTES", help="smaller bodies are kept")
    sink = Sink(parser.parse_args().keep_below)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=Connection(connection, sink).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()  # ends with whoever started it


if __name__ == "__main__":
    main()
