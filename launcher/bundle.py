"""The user's code as it is at the launch: which files, and whether they are small enough to be copied with the job.

In a git tree: what is tracked, and what is not and not ignored. Elsewhere: the Python files beside the config, and the
packages from there that the targets import. launcher/pack.py puts them into one archive, runtime/codedir.py unpacks it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dtrain.launcher.console import plural, size

_GIT_TIMEOUT_S = 60
_MAX_OTHER_BYTES = 1 << 20  # outside of git: of a file in a package that is not Python
# Left out wherever they are: an archive lies in the run directory, which others may read.
_SECRETS = (".env", ".env.*", ".netrc", ".pypirc", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*",
            "credentials", "credentials.json", ".git-credentials")  # fmt: skip
_NOT_SECRET = ("*.example", "*.sample", "*.template", "*.pub")
_CODE = (".py", ".so")
_NEVER = ("__pycache__", "*.pyc", ".git")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A top-level module or package that the targets have brought in."""

    name: str
    folder: str  # in which it was found
    package: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Files of one folder. `folder`: their place in the archive; sizes in bytes by path relative to `root`."""

    root: str
    folder: str
    git: bool
    sizes: Mapping[str, int]
    secrets: tuple[str, ...]  # left out

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    trees: tuple[Tree, ...]
    sys_path: tuple[str, ...]  # folders in the trees from which targets were imported, beside those that are known

    @property
    def roots(self) -> dict[str, str]:
        return {tree.folder: tree.root for tree in self.trees}

    @property
    def size_bytes(self) -> int:
        return sum(tree.size_bytes for tree in self.trees)

    @property
    def num_files(self) -> int:
        return sum(len(tree.sizes) for tree in self.trees)


def collect(places: Sequence[str], modules: Sequence[Module], exclude: Sequence[str]) -> Bundle:
    """The code of `places` (absolute folders, the config's first) and of those `modules` that lie in them.

    `exclude`: folders that are no code wherever they are, such as the run directory; files with secrets.
    """
    git_roots = {place: _git_root(place) for place in places}
    roots: dict[str, str | None] = {}  # root -> None, or the git tree's root
    for index, place in enumerate(places):
        root = git_roots[place] or place
        if index == 0 or any(_inside(module.folder, root) for module in modules):
            roots.setdefault(root, git_roots[place])
    trees: list[Tree] = []
    for root, git_root in roots.items():
        names = _git_files(root) if git_root else _loose_files(root, modules, beside=root == places[0])
        trees.append(_tree(root, _folder_name(root, trees), git_root is not None, names, exclude))
    found = [module.folder for module in modules if any(_inside(module.folder, root) for root in roots)]
    return Bundle(trees=tuple(trees), sys_path=tuple(dict.fromkeys(found)))


def describe_bundle(bundle: Bundle) -> str:
    """Like `214 files, 1.3 MB of /home/me/project (git), as of now`."""
    where = " and ".join(tree.root + (" (git)" if tree.git else "") for tree in bundle.trees)
    secrets = [name for tree in bundle.trees for name in tree.secrets]
    without = f"; without {', '.join(secrets[:3])}{', ...' if len(secrets) > 3 else ''}" if secrets else ""
    return f"{plural(bundle.num_files, 'file')}, {size(bundle.size_bytes)} of {where}, as of now{without}"


def over_limit(bundle: Bundle, limit_mb: int) -> str:
    """What speaks against its size, with the largest files; "" where nothing does."""
    if bundle.size_bytes <= limit_mb * 1_000_000:
        return ""
    sizes = {f"{tree.root}/{name}": count for tree in bundle.trees for name, count in tree.sizes.items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} ({size(sizes[name])})" for name in largest)
    where = " and ".join(tree.root for tree in bundle.trees)
    advice = (
        "Have git ignore what is no code" if any(tree.git for tree in bundle.trees) else "Move what is no code away"
    )
    return (
        f"the code in {where} is {size(bundle.size_bytes)} in {bundle.num_files} files, more than the "
        f"{limit_mb} MB that a launch copies. Largest: {named}. {advice} (it stays visible to the nodes), raise the "
        "limit, or set cluster.code: live."
    )


# ---- which files ----


def _git_root(place: str) -> str | None:
    """The top of the git tree around `place`. Somebody's whole home directory under git is no project."""
    top = _git(place, "rev-parse", "--show-toplevel")
    root = "" if top is None else os.path.realpath(top.decode(errors="surrogateescape").rstrip("\n"))
    if not root or os.path.realpath(os.path.expanduser("~")) == root or root == "/":
        return None
    # As the user names it: through the links by which they came.
    up = os.path.relpath(root, os.path.realpath(place))
    return os.path.normpath(os.path.join(place, up))


def _git(place: str, *words: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", place, *words],
            capture_output=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _git_files(root: str) -> list[str]:
    """Tracked ones, those of submodules included, and untracked ones that are not ignored."""
    tracked = _git(root, "ls-files", "-z", "--cached", "--recurse-submodules") or b""
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard") or b""
    return [os.fsdecode(name) for name in (tracked + others).split(b"\0") if name and not name.endswith(b"/")]


def _loose_files(root: str, modules: Sequence[Module], *, beside: bool) -> Iterator[str]:
    if beside:
        with contextlib.suppress(OSError):
            yield from (entry.name for entry in os.scandir(root) if entry.name.endswith(_CODE))
    for module in modules:
        if not _inside(module.folder, root):
            continue
        folder = os.path.relpath(module.folder, root)
        if not module.package:
            yield os.path.normpath(os.path.join(folder, f"{module.name}.py"))
            continue
        yield from (os.path.relpath(path, root) for path in _package_files(os.path.join(module.folder, module.name)))


def _package_files(package: str) -> Iterator[str]:
    """Its Python, and what lies beside it and is small; a folder without any Python in it holds data."""
    for place, names, files in os.walk(package):
        names[:] = sorted(name for name in names if not name.startswith(".") and not _is_venv(place, name))
        has_code = any(file.endswith(_CODE) for file in files)
        for file in sorted(files) if has_code else ():
            path = os.path.join(place, file)
            if file.endswith(_CODE) or _size(path) <= _MAX_OTHER_BYTES:
                yield path


def _tree(root: str, folder: str, git: bool, names: Iterable[str], exclude: Sequence[str]) -> Tree:
    listed = list(dict.fromkeys(names))
    never = {*_run_directories(listed), *_environments(listed)}
    outside = [os.path.relpath(path, root) for path in exclude if _inside(path, root) and path != root]
    sizes: dict[str, int] = {}
    secrets = []
    for name in listed:
        parts = name.split("/")
        folders = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if folders & never or folders.intersection(outside) or any(_matches(part, _NEVER) for part in parts):
            continue
        num_bytes = _packed_size(root, name)
        if num_bytes < 0:
            continue
        if name in outside or (_matches(parts[-1], _SECRETS) and not _matches(parts[-1], _NOT_SECRET)):
            secrets.append(name)
        else:
            sizes[name] = num_bytes
    return Tree(root=root, folder=folder, git=git, sizes=sizes, secrets=tuple(sorted(secrets)))


def _run_directories(names: Iterable[str]) -> set[str]:
    """Folders of earlier runs among the files: no part of the code, and large."""
    known = set(names)
    jobs = (name.removesuffix("/job.json") for name in known if name.endswith("/job.json"))
    return {folder for folder in jobs if f"{folder}/events.jsonl" in known}


def _environments(names: Iterable[str]) -> set[str]:
    return {name.removesuffix("/pyvenv.cfg") for name in names if name.endswith("/pyvenv.cfg")}


def _is_venv(place: str, name: str) -> bool:
    return os.path.exists(os.path.join(place, name, "pyvenv.cfg"))


def _packed_size(root: str, name: str) -> int:
    """Bytes; -1 for what is not packed: gone, unreadable, no regular file, or a link that leads out of the tree."""
    path = os.path.join(root, name)
    if os.path.islink(path):
        return 0 if _leads_inside(root, name) else -1
    return os.path.getsize(path) if os.path.isfile(path) and os.access(path, os.R_OK) else -1


def _leads_inside(root: str, name: str) -> bool:
    with contextlib.suppress(OSError):
        target = os.readlink(os.path.join(root, name))
        place = os.path.normpath(os.path.join(os.path.dirname(name), target))
        return not os.path.isabs(target) and place.split("/")[0] != ".."
    return False


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _folder_name(root: str, others: Sequence[Tree]) -> str:
    name = os.path.basename(root) or "root"
    taken = {tree.folder for tree in others}
    return name if name not in taken else f"{name}-{len(others) + 1}"
