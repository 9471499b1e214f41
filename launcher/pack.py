"""The files of a bundle in one archive, named by its content. Equal files give equal archives."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import tarfile
import time
from pathlib import Path
from typing import IO, cast

from dtrain.launcher.bundle import Bundle

_MTIME = 315532800  # 1980: a constant, so that equal files give equal archives, and no tool finds it too old
_COMPRESSION = 1  # a launch waits for it


class _Hashing(io.RawIOBase):
    """Passes bytes on and keeps their sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return self._file.write(data)


def pack(bundle: Bundle, folder: Path) -> str:
    """Writes FOLDER/<sha256>.tar.gz, unless it is there already; the sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.{time.monotonic_ns()}.tar.gz"
    try:
        with open(temporary, "xb") as file:
            hashing = _Hashing(file)
            target = cast(IO[bytes], hashing)
            with gzip.GzipFile("", "wb", compresslevel=_COMPRESSION, fileobj=target, mtime=0) as packed:
                _write(bundle, cast(IO[bytes], packed))
            file.flush()
            os.fsync(file.fileno())
        digest = hashing.digest.hexdigest()
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder / f"{digest}.tar.gz")
        return digest
    finally:
        temporary.unlink(missing_ok=True)


def _write(bundle: Bundle, packed: IO[bytes]) -> None:
    with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for tree in bundle.trees:
            for name in sorted(tree.sizes):
                _add(tar, os.path.join(tree.root, name), f"{tree.folder}/{name}")


def _add(tar: tarfile.TarFile, path: str, name: str) -> None:
    """One member. What has gone since it was listed is left out, what has changed is packed as it is now."""
    member = tarfile.TarInfo(name)
    member.mtime = _MTIME
    try:
        if os.path.islink(path):
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
            tar.addfile(member)
            return
        with open(path, "rb") as file:
            data = file.read()
            executable = os.fstat(file.fileno()).st_mode & 0o100
    except OSError:
        return
    member.size = len(data)
    member.mode = 0o755 if executable else 0o644
    tar.addfile(member, io.BytesIO(data))
