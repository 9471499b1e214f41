"""HTTPS before the API of the tests' Kubernetes: reads requests, writes answers and streams, and breaks connections
where a test has ordered it.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kubeserver_access import User, authenticate
from kubeserver_faults import Cut, Faults
from kubeserver_rest import Answer, Api, Request, route, verb_of
from kubeserver_store import Refused

VERSION = {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64"}


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: str, port: int, context: ssl.SSLContext, api: Api, users: Mapping[str, User], faults: Faults
    ) -> None:
        self.api = api
        self.users = dict(users)
        self.faults = faults
        self.context = context
        super().__init__((address, port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True, name="kube-http")

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(10)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a client that never says its first word holds up nobody."""
        if self.faults.down:
            return
        request.settimeout(60)
        try:
            wrapped = self.context.wrap_socket(request, server_side=True)
        except (OSError, ValueError):
            return
        with contextlib.suppress(OSError, ValueError), wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer
    disable_nagle_algorithm = True

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self._retry_after: int | None = None
        try:
            try:
                answer, lose = self._answered(body)
            except Refused as refused:
                answer, lose = Answer(body=refused.body, code=refused.code), False
                self._retry_after = refused.retry_after_s
            if lose:
                raise Cut
            self._write(answer)
        except (Cut, OSError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _answered(self, body: bytes) -> tuple[Answer, bool]:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        path = urllib.parse.unquote(parts.path)
        if self.server.faults.down:
            raise Cut
        user = authenticate(self.headers.get("Authorization"), self.server.users)
        if path in ("/version", "/version/"):
            return Answer(body=dict(VERSION)), False
        if path in ("/livez", "/readyz", "/healthz"):
            return Answer(stream=iter([b"ok"]), content_type="text/plain"), False
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip()
        request = Request(method=self.command, path=path, query=query, body=body, content_type=kind, user=user)
        where = route(_whole(path))
        verb = verb_of(request, where)
        full = f"{where.resource.plural}/{where.sub}" if where.sub else where.resource.plural
        lose = self.server.faults.before(verb, full)
        return self.server.api.answer(request, where, verb), lose

    def _write(self, answer: Answer) -> None:
        body = json.dumps(answer.body).encode() + b"\n" if answer.body is not None else b""
        self.send_response(answer.code)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Cache-Control", "no-cache, private")
        for words in answer.warnings:
            # RFC 7234, 5.5, as https://kubernetes.io/blog/2020/09/03/warnings/ describes.
            self.send_header("Warning", f"299 - {json.dumps(words)}")
        if self._retry_after is not None:
            self.send_header("Retry-After", str(self._retry_after))
        if answer.stream is None:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for part in answer.stream:
            if self.server.faults.down:
                raise Cut
            if part:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.flush()
            elif self._is_gone():
                raise Cut
        self.wfile.write(b"0\r\n\r\n")

    def _is_gone(self) -> bool:
        """Whether the client of a stream has hung up."""
        try:
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            self.connection.settimeout(0.2)
            return not self.connection.recv(1)
        except (OSError, ValueError):
            return True


def _whole(path: str) -> str:
    """A namespace itself is reached by the path that other paths begin with."""
    parts = path.split("/")
    return (
        "/api/v1/namespaces/" + parts[4] if parts[:4] == ["", "api", "v1", "namespaces"] and len(parts) == 5 else path
    )
