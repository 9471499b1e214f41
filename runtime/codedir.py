"""The user's code on a node: the job's archive, unpacked to the node's own disk, and how paths lead into it.

What the archive leaves out (data, files that git ignores, builds) stays visible where it was: a link stands in its
place, if the node has the original folder. What packs it is launcher/bundle.py.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.errors import NodeError, StorageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, obtain
from dtrain.cluster.scratch import Hold, hold, sweep

_CHUNK_BYTES = 1 << 20
_NOT_LINKED = frozenset({"__pycache__"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeDir:
    """`roots`: folder in the archive -> the original on the submitting host, of which it is a copy."""

    held: Hold
    roots: Mapping[str, str]

    @property
    def places(self) -> dict[str, str]:
        """Folder of the copy -> the original's, for words that a person reads."""
        return {str(self.held.path / folder): root for folder, root in self.roots.items()}

    def map(self, path: str) -> str:
        """The copy of an original path; a path that is in no copy stays what it is."""
        for folder, root in sorted(self.roots.items(), key=lambda item: -len(item[1])):
            if path == root or path.startswith(root.rstrip("/") + "/"):
                copy = self.held.path / folder / os.path.relpath(path, root)
                return os.path.normpath(copy) if copy.exists() else path
        return path

    def cwd(self, path: str) -> str:
        """The working directory of the submitter where the node has it: data with relative paths is there."""
        return path if os.path.isdir(path) else self.map(path) if os.path.isdir(self.map(path)) else str(self.held.path)


def unpack_code(plan: JobPlan) -> CodeDir | None:
    """The job's code, shared by all its nodes on this machine; None for a job without an archive. Raises NodeError."""
    if not plan.code_digest:
        return None
    sweep()
    archive = RunDir(plan.run_dir).code(plan.code_digest)

    def fill(folder: Path) -> None:
        obtain(archive)
        _verify(archive, plan.code_digest)
        _extract(archive, folder)
        for name, root in plan.code_roots.items():
            _link_the_rest(Path(root), folder / name)

    try:
        held = hold(f"{plan.job_id}-{plan.code_digest[:12]}", fill)
    except (OSError, StorageError, tarfile.TarError, EOFError) as error:
        raise NodeError(f"the job's code can't be unpacked from {archive}: {error}") from error
    return CodeDir(held=held, roots=plan.code_roots)


def _verify(archive: Path, digest: str) -> None:
    found = hashlib.sha256()
    with open(archive, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise NodeError(f"{archive} is not what was submitted (its sha256 is {found.hexdigest()}). Launch again.")


def _extract(archive: Path, folder: Path) -> None:
    """Nothing lands outside of `folder`, whatever names the archive holds."""
    with tarfile.open(archive, "r|gz") as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
            return
        for member in tar:  # Python 3.11.4 and newer need none of this
            _refuse_odd(member, folder)
            tar.extract(member, folder)


def _refuse_odd(member: tarfile.TarInfo, folder: Path) -> None:
    """Raises TarError for what launcher/pack.py never writes: other than files and links, ways out of `folder`."""
    top, place = os.path.realpath(folder), os.path.join(folder, member.name)
    places = [os.path.dirname(place)]
    if member.issym():
        places.append(os.path.join(os.path.dirname(place), member.linkname))
    inside = all(os.path.commonpath([top, os.path.realpath(path)]) == top for path in places)
    absolute = os.path.isabs(member.name) or (member.issym() and os.path.isabs(member.linkname))
    if not (member.isreg() or member.issym()) or absolute or not inside or os.path.basename(member.name) == "..":
        raise tarfile.TarError(f"{member.name!r} leads out of the copy, or is no file")


def _link_the_rest(original: Path, copy: Path) -> None:
    """A link for each entry that `original` has and `copy` has not, in every folder that both have."""
    if not original.is_dir():
        return
    for place, _, _ in os.walk(copy):
        there = original / os.path.relpath(place, copy)
        try:
            entries = list(os.scandir(there))
        except OSError:
            continue  # the node does not have this folder, or it has gone since
        for entry in entries:
            link = os.path.join(place, entry.name)
            if entry.name not in _NOT_LINKED and not os.path.lexists(link):
                os.symlink(os.path.abspath(entry.path), link)
