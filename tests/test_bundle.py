"""The code that goes with a job: which files, the archive, the copy on a node, and that a run keeps the code it began
with."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dtrain.cluster import scratch
from dtrain.cluster.errors import ConfigError, NodeError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.launcher import cli
from dtrain.launcher.bundle import Module, collect, over_limit
from dtrain.launcher.compose import load_config
from dtrain.launcher.pack import pack
from dtrain.launcher.plan import make_plan
from dtrain.launcher.submit import gather_code
from dtrain.launcher.targetcheck import look_at_targets
from dtrain.runtime.codedir import CodeDir, unpack_code


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git tree with all that makes one hard."""
    folder = tmp_path / "my project"
    write(
        folder,
        {
            "train/cfg.yaml": "x", "src/pkg/__init__.py": "", "src/pkg/net.py": "WIDTH = 3", "new.py": "untracked",
            ".gitignore": "data/\n*.so\n", "data/big.bin": "d" * 1000, "src/pkg/fast.so": "built", ".env": "KEY=1",
            ".env.example": "KEY=", "certs/site.pem": "key", "runs/old/job.json": "{}", "runs/old/events.jsonl": "",
            "runs/old/logs/a.log": "l" * 5000, "env/pyvenv.cfg": "", "env/lib/x.py": "", "gone.py": "",
            "naïve \n name.py": "", "run.sh": "#!/bin/sh", "__pycache__/new.cpython-311.pyc": "",
        },
    )  # fmt: skip
    (folder / "run.sh").chmod(0o755)
    (folder / "inside").symlink_to("src/pkg")
    (folder / "outside").symlink_to("/etc/hostname")
    (folder / "train" / "above").symlink_to("../../elsewhere")
    git(folder, "init", "-q")
    git(folder, "add", "src", "gone.py", ".gitignore")
    git(folder, "commit", "-qm", "x")
    (folder / "gone.py").unlink()
    os.mkfifo(folder / "pipe")
    return folder


PACKED = {
    ".env.example", ".gitignore", "inside", "naïve \n name.py", "new.py", "run.sh", "src/pkg/__init__.py",
    "src/pkg/net.py", "train/cfg.yaml",
}  # fmt: skip


def test_a_git_tree_gives_what_git_would_know(project: Path) -> None:
    """Tracked or not, but not ignored; neither earlier runs nor environments, secrets, links that lead out, pipes."""
    (tree,) = collect([f"{project}/train", str(project)], [], exclude=[]).trees
    assert (tree.root, tree.folder, tree.git) == (str(project), "my project", True)
    assert set(tree.sizes) == PACKED
    assert tree.secrets == (".env", "certs/site.pem")
    assert tree.size_bytes == sum((project / name).lstat().st_size for name in PACKED - {"inside"})
    (tree,) = collect([str(project)], [], exclude=[str(project / "src"), "/elsewhere"]).trees
    assert set(tree.sizes) == {name for name in PACKED if not name.startswith("src")}


def test_submodules_are_packed(project: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    write(library, {"lib/code.py": "x = 1"})
    git(library, "init", "-q")
    git(library, "add", ".")
    git(library, "commit", "-qm", "x")
    git(project, "submodule", "add", "-q", str(library), "third party")
    (tree,) = collect([str(project)], [], exclude=[]).trees
    assert "third party/lib/code.py" in tree.sizes


def test_outside_of_git_the_modules_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "exp", tmp_path / "other"
    kept = ("a.py", "b.py", "pkg/m.py", "pkg/words.txt", "pkg/deep/n.py")
    left = ("cfg.yaml", "data/x.csv", "pkg/images/1.png", "pkg/.hidden/h.py", "pkg/__pycache__/m.pyc", "unused/u.py")
    write(folder, dict.fromkeys([*kept, *left], "x"))
    (folder / "pkg" / "weights.bin").write_bytes(bytes(2 << 20))
    write(other, {"c.py": "", "d.py": ""})
    modules = [
        Module(name="a", folder=str(folder), package=False),
        Module(name="pkg", folder=str(folder), package=True),
    ]
    (tree,) = collect([str(folder), str(other)], modules, exclude=[]).trees
    assert set(tree.sizes) == set(kept)
    modules.append(Module(name="c", folder=str(other), package=False))
    first, second = collect([str(folder), str(other)], modules, exclude=[]).trees
    assert (first.root, set(second.sizes)) == (str(folder), {"c.py"})
    # A home directory that is under git is no project.
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not any(tree.git for tree in collect([str(folder)], modules, exclude=[]).trees)


def test_equal_files_give_one_archive(project: Path, tmp_path: Path) -> None:
    bundle = collect([str(project)], [], exclude=[])
    archives = tmp_path / "code"
    digest = pack(bundle, archives)
    os.utime(project / "new.py", (1, 1))
    assert pack(collect([str(project)], [], exclude=[]), archives) == digest
    assert [path.name for path in archives.iterdir()] == [f"{digest}.tar.gz"]
    (project / "new.py").write_text("changed")
    assert pack(collect([str(project)], [], exclude=[]), archives) != digest
    (project / "new.py").unlink()  # between the listing and the packing
    other = pack(bundle, archives)
    with tarfile.open(archives / f"{other}.tar.gz") as tar:
        assert "my project/new.py" not in tar.getnames()
        assert tar.getmember("my project/run.sh").mode == 0o755
        assert tar.getmember("my project/inside").linkname == "src/pkg"


def test_a_bundle_over_its_limit_names_the_largest(tmp_path: Path) -> None:
    write(tmp_path / "p", {"a.py": "x", "notes.txt": "n" * 1_500_000, "table.csv": "t" * 2_500_000})
    git(tmp_path / "p", "init", "-q")
    bundle = collect([str(tmp_path / "p")], [], exclude=[])
    message = over_limit(bundle, 3)
    assert message.startswith(
        f"the code in {tmp_path}/p is 4.0 MB in 3 files, more than the 3 MB that a launch copies."
    )
    assert f"Largest: {tmp_path}/p/table.csv (2.5 MB), {tmp_path}/p/notes.txt (1.5 MB)" in message
    assert over_limit(bundle, 5) == ""


# ---- on the node ----


@pytest.fixture
def plan(project: Path, tmp_path: Path) -> JobPlan:
    run = RunDir(tmp_path / "run")
    bundle = collect([f"{project}/train"], [], exclude=[])
    made = JobPlan(
        name="toy", run_dir=str(run.path), job_id="local-1", backend="local", nodes=1, procs_per_node=1,
        gpus_per_node=0, threads_per_proc=1, python=sys.executable, argv=(), cwd=str(project), env={},
        sys_path=(f"{project}/train", str(project)), checkpoint_url="", workers="exec", max_restarts_without_progress=3,
        code_roots=bundle.roots, code_digest=pack(bundle, run.path / "code"),
    )  # fmt: skip
    assert JobPlan.from_json(json.loads(json.dumps(made.to_json()))) == made
    return made


@contextlib.contextmanager
def unpacked(plan: JobPlan) -> Iterator[CodeDir]:
    code = unpack_code(plan)
    assert code is not None
    try:
        yield code
    finally:
        code.held.close()


@pytest.fixture(params=["this Python", "Python 3.11.2"])
def any_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's has no filter for archives yet."""
    if request.param != "this Python":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


def test_a_copy_and_links_to_the_rest(plan: JobPlan, project: Path, any_python: None) -> None:
    (project / "new.py").write_text("edited after the launch")
    with unpacked(plan) as code:
        copy = Path(code.map(str(project)))
        assert copy != project
        assert (copy / "new.py").read_text() == "untracked"
        assert (copy / "run.sh").stat().st_mode & 0o777 == 0o755
        assert (copy / "inside" / "net.py").read_text() == "WIDTH = 3"
        # What git ignores, and what was left out, is where it was.
        assert (copy / "data" / "big.bin").read_text() == "d" * 1000
        assert (copy / "src" / "pkg" / "fast.so").read_text() == "built"
        assert os.readlink(copy / ".env") == str(project / ".env")
        assert os.readlink(copy / "outside") == str(project / "outside")
        assert not (copy / "__pycache__").exists()
        assert code.map(f"{project}/train") == f"{copy}/train"
        assert code.map("/usr/lib") == "/usr/lib"
        assert code.map(f"{project} too") == f"{project} too"
        assert code.cwd(str(project)) == str(project)
        assert code.places == {str(copy): str(project)}
    assert (project / "data" / "big.bin").exists()


def test_a_node_without_the_original(plan: JobPlan, project: Path, tmp_path: Path) -> None:
    project.rename(tmp_path / "elsewhere")
    with unpacked(plan) as code:
        copy = Path(code.map(str(project)))
        assert (copy / "src" / "pkg" / "net.py").read_text() == "WIDTH = 3"
        assert not (copy / "data").exists()
        assert code.cwd(str(project)) == str(copy)
        assert code.cwd("/no/such/folder") == str(code.held.path)


def test_nodes_share_a_copy_and_the_last_one_removes_it(plan: JobPlan) -> None:
    with unpacked(plan) as first:
        with unpacked(plan) as second:
            assert first.held.path == second.held.path
        assert first.held.path.is_dir()
        with unpacked(replace(plan, job_id="local-2")) as other:
            assert other.held.path != first.held.path
    assert not first.held.path.exists()
    assert not first.held.path.parent.exists()


NODE = """
import json, sys, time
from dtrain.cluster.jobplan import JobPlan
from dtrain.runtime.codedir import unpack_code
plan = JobPlan.from_json(json.loads(sys.argv[1]))
"""


def test_what_a_killed_node_leaves_goes_with_the_next_job(plan: JobPlan) -> None:
    body = "code = unpack_code(plan)\nprint(code.held.path, flush=True)\ntime.sleep(600)\n"
    argv = [sys.executable, "-c", NODE + body, json.dumps(plan.to_json())]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        scratch.sweep()
        assert left.is_dir()  # it lives
        process.kill()
    assert left.is_dir()
    with unpacked(replace(plan, job_id="local-2")):
        assert not left.exists()


def test_many_nodes_at_once_unpack_once(plan: JobPlan) -> None:
    body = (
        "for _ in range(20):\n"
        "    code = unpack_code(plan)\n"
        "    assert len(list(code.held.path.glob('*/src/pkg/net.py'))) == 1\n"
        "    code.held.close()\n"
    )
    argv = [sys.executable, "-c", NODE + body, json.dumps(plan.to_json())]
    processes = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate(timeout=300)[1], process.returncode) for process in processes] == [("", 0)] * 4


def test_somebody_elses_folder_is_not_used(plan: JobPlan) -> None:
    base = Path(tempfile.gettempdir(), f"dtrain-{os.getuid()}")
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    with pytest.raises(NodeError, match="not a folder that only you may write to"):
        unpack_code(plan)
    base.rmdir()


def test_an_archive_that_is_another_one(plan: JobPlan) -> None:
    archive = RunDir(plan.run_dir).code(plan.code_digest)
    archive.write_bytes(archive.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(NodeError, match="is not what was submitted"):
        unpack_code(plan)
    archive.unlink()
    with pytest.raises(NodeError, match=r"can't be unpacked .*No such file"):
        unpack_code(plan)


@pytest.mark.parametrize("name", ["../out.py", "/tmp/out.py", "p/../../out.py", "link/out.py"])
def test_hostile_names_stay_inside_or_are_refused(plan: JobPlan, tmp_path: Path, name: str, any_python: None) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        if name.startswith("link"):
            tar.addfile(link)
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    folder = RunDir(plan.run_dir).path / "code"
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    (folder / f"{digest}.tar.gz").write_bytes(raw.getvalue())
    with contextlib.suppress(NodeError), unpacked(replace(plan, code_digest=digest, code_roots={})) as code:
        assert [path.name for path in code.held.path.rglob("*.py")] == ["out.py"]
    assert not list(tmp_path.glob("out.py"))
    assert not Path("/tmp/out.py").exists()


# ---- a launch ----

TOY = """
import os, time, torch
from dataclasses import replace
from pathlib import Path
from lib.version import VERSION
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        import late
        data = (Path(__file__).parent / "data.txt").read_text()
        print("version", VERSION, late.VERSION, data, os.getcwd(), flush=True)
        Path("started").touch()
    def forward(self, x):
        while Path("hold").exists():
            time.sleep(0.01)
        return self.line(x)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        if Path("fail").exists():
            raise RuntimeError("no more")
        return torch.tensor([i / 8.0]), torch.tensor([i / 4.0])
def loss(output, batch): return ((output - batch[1]) ** 2).mean()
"""
CONFIG = """
model: toy.Model
loss: toy.loss
data: {train: toy.Data, batch_size: 4}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train: {steps: 3}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project outside of git; the working directory is in it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    files = {"toy.py": TOY, "late.py": "VERSION = 'late'", "lib/version.py": "VERSION = 'first'", "toy.yaml": CONFIG}
    write(tmp_path, {**files, "data.txt": "data", "unused/x.py": ""})
    return tmp_path


def versions(folder: Path, attempt: int) -> str:
    log = (folder / "runs" / "toy" / "logs" / f"a{attempt:04d}" / "node-0.log").read_text()
    return next(line.partition("] version ")[2] for line in log.splitlines() if "] version " in line)


@pytest.mark.slow
def test_what_the_targets_bring_in(toy: Path) -> None:
    config = load_config("toy.yaml")
    plan = make_plan(config, job_id="x", argv=(), cwd=str(toy))
    checked = look_at_targets(config, sys.executable, plan.sys_path)
    assert checked.problems == []
    assert {module.name for module in checked.modules if module.folder == str(toy)} == {"toy", "lib"}
    code = gather_code(config, plan, checked.modules)
    assert code is not None
    assert set(code.trees[0].sizes) == {"toy.py", "late.py", "lib/version.py"}
    assert gather_code(load_config("toy.yaml", ["cluster.code=live"]), plan, checked.modules) is None


@pytest.mark.slow
def test_what_pods_do_not_mount_is_copied_too(
    toy: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the launching machine has it from: the variable PYTHONPATH says nothing to a pod."""
    away = tmp_path_factory.mktemp("away")
    write(away, {"borrowed/__init__.py": "", "other.py": ""})
    write(toy, {"toy.py": "import borrowed\n" + TOY})
    monkeypatch.setenv("PYTHONPATH", str(away))
    config = load_config("toy.yaml")
    plan = make_plan(config, job_id="x", argv=(), cwd=str(toy))
    modules = look_at_targets(config, sys.executable, plan.sys_path).modules
    for backend, volumes, wanted in (
        ("kubernetes", {}, 1),
        ("kubernetes", {str(away): "pvc:data"}, 0),
        ("local", {}, 0),
    ):
        asked = replace(plan, backend=backend, kubernetes=replace(plan.kubernetes, volumes=volumes))
        code = gather_code(config, asked, modules)
        assert code is not None
        found = [set(tree.sizes) for tree in code.trees if tree.root == str(away)]
        assert found == [{"borrowed/__init__.py"}] * wanted
        assert (str(away) in code.sys_path) == bool(wanted)


def test_a_script_is_copied_only_when_asked(toy: Path) -> None:
    write(toy, {"cfg.yaml": "script: train.py --x", "train.py": "", "pkg/__init__.py": "", "pkg/m.py": ""})
    for words, expected in ([], None), (["cluster.code=bundle"], {"train.py", "pkg/__init__.py", "pkg/m.py"}):
        config = load_config("cfg.yaml", words)
        plan = make_plan(config, job_id="x", argv=(), cwd=str(toy))
        code = gather_code(config, plan, look_at_targets(config, sys.executable, plan.sys_path).modules)
        found = set() if code is None else set(code.trees[0].sizes)
        assert (code is None) if expected is None else expected <= found
        assert "unused/x.py" not in found


@pytest.mark.slow
def test_a_launch_over_the_limit_says_so_and_leaves_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "lib" / "table.py").write_text("#" * 1_000_000)
    assert cli.main(["launch", "toy.yaml", "cluster.bundle_limit_mb=1"]) == 2
    said = capsys.readouterr().err
    assert "command line: cluster.bundle_limit_mb: the code in " in said
    assert f"Largest: {toy}/lib/table.py (1.0 MB)" in said
    assert not (toy / "runs").exists()
    with pytest.raises(ConfigError, match="expects a whole number of at least 1"):
        load_config("toy.yaml", ["cluster.bundle_limit_mb=0"])


@pytest.mark.e2e
def test_a_run_keeps_the_code_that_it_began_with(toy: Path) -> None:
    """Edited while it runs, and started again after a kill: the same code; the next launch takes the new one."""
    (toy / "hold").touch()
    launching = subprocess.Popen(
        [sys.executable, "-m", "dtrain.launcher.cli", "launch", "toy.yaml"], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    while not (toy / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    write(toy, {"lib/version.py": "VERSION = 'second'", "late.py": "VERSION = 'edited'"})
    (toy / "started").unlink()
    status = RunDir(toy / "runs" / "toy")
    while not (workers := _workers(status)):
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    while not (toy / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (toy / "hold").unlink()
    said = launching.communicate(timeout=800)[0]
    assert launching.returncode == 0, said
    assert "  code         3 files, " in said
    assert versions(toy, 1) == versions(toy, 2) == f"first late data {toy}"
    assert cli.main(["launch", "toy.yaml", "train.steps=5"]) == 0
    assert versions(toy, 3) == f"second edited data {toy}"
    assert len(list((toy / "runs" / "toy" / "code").iterdir())) == 2


def _workers(run: RunDir) -> list[int]:
    jobs = [json.loads(path.read_text()) for path in run.path.glob("control/*/status.json")]
    return [worker["pid"] for job in jobs for worker in job["workers"] if psutil.pid_exists(worker["pid"])]


@pytest.mark.e2e
def test_failures_are_told_in_the_users_own_places(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "fail").touch()
    assert cli.main(["launch", "toy.yaml"]) == 93
    line = next(number for number, text in enumerate(TOY.splitlines(), 1) if "no more" in text)
    failure = json.loads((toy / "runs" / "toy" / "failure.json").read_text())
    assert failure["where"] == f"{toy}/toy.py:{line}"
    assert f'File "{toy}/toy.py", line {line}' in "\n".join(failure["evidence"])
    assert "dtrain-" not in capsys.readouterr().out
