"""In place of Ray's Jobs API, for tests of a client's accidents, of which Ray itself can bear few at a time: it takes a
submission id once, starts the entry point as a process, and tells what became of it, in Ray 2.60's own words.

    with ray_jobs() as jobs:
        jobs.url
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "stand-in"}


class RayJobs:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
        self._stopped: set[str] = set()
        handler = type("Handler", (_Handler,), {"jobs": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def jobs(self) -> list[str]:
        """Those that are not over."""
        with self._lock:
            return [name for name, (_, process) in self._jobs.items() if process.poll() is None]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for _, process in self._jobs.values():
            process.kill()
            process.wait()

    def submit(self, request: dict[str, Any]) -> tuple[int, str]:
        name = request["submission_id"]
        with self._lock:
            if name in self._jobs:
                return 500, f"ValueError: Job with submission_id {name} already exists. Please use a different one."
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(shlex.split(request["entrypoint"]), stdin=quiet, stdout=quiet, stderr=quiet)
            self._jobs[name] = request["entrypoint"], process
        return 200, json.dumps({"job_id": name, "submission_id": name})

    def look(self, name: str) -> tuple[int, str]:
        with self._lock:
            if name not in self._jobs:
                return 404, f"Job {name} does not exist"
            entrypoint, process = self._jobs[name]
            code = process.poll()
        ended = "STOPPED" if name in self._stopped else "FAILED" if code else "SUCCEEDED"
        found = {"type": "SUBMISSION", "submission_id": name, "entrypoint": entrypoint, "driver_exit_code": code}
        return 200, json.dumps({**found, "status": "RUNNING" if code is None else ended})

    def stop(self, name: str) -> tuple[int, str]:
        with self._lock:
            if name not in self._jobs:
                return 404, f"Job {name} does not exist"
            running = self._jobs[name][1].poll() is None
            if running:
                self._stopped.add(name)
                self._jobs[name][1].terminate()
        return 200, json.dumps({"stopped": running})


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client is gone in the middle of its request."""


class _Handler(BaseHTTPRequestHandler):
    jobs: RayJobs

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, json.dumps(VERSION))
        else:
            self._answer(*self.jobs.look(self.path.rpartition("/")[2]))

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            return  # the client is gone
        if self.path == "/api/jobs/":
            self._answer(*self.jobs.submit(json.loads(body)))
        else:
            self._answer(*self.jobs.stop(self.path.split("/")[-2]))

    def _answer(self, code: int, text: str) -> None:
        body = text.encode()
        with contextlib.suppress(OSError):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def ray_jobs() -> Iterator[RayJobs]:
    found = RayJobs()
    try:
        yield found
    finally:
        found.close()
