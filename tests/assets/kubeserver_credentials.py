"""The certificate of the tests' Kubernetes, which is its own authority, and the files by which clients know it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


def certify(root: Path, inner: str) -> None:
    names = f"subjectAltName=IP:127.0.0.1,IP:{inner},DNS:localhost,DNS:kubernetes.default.svc"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "2", "-subj", "/CN=kubeserver", "-addext", names,
         "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
         "-keyout", root / "ca.key", "-out", root / "ca.crt"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip


def write_kubeconfig(path: Path, ca: Path, url: str, token: str) -> None:
    # The certificate by its path: as data it would be written to a temporary file by each client
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
    }  # fmt: skip
    path.write_text(json.dumps(config))
