"""What happens on a node before its workers: setup lines, the look at its Python, interface and ports, secrets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from toyjob import toy_plan

from dtrain.cluster import nodescript
from dtrain.cluster.errors import ConfigError, UsageError
from dtrain.cluster.interfaces import Interface, list_interfaces, network_of, pick
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.local import LocalBackend
from dtrain.cluster.ports import listening_socket
from dtrain.cluster.rundir import RunDir, read_jsonl
from dtrain.cluster.version import VERSION
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.launcher import cli
from dtrain.launcher.compose import load_config
from dtrain.launcher.targetcheck import check_targets
from dtrain.runtime.nodelog import LineSplitter
from dtrain.runtime.redact import redactor

TOKEN = "s3cr3t/+value"


def plan(run_dir: Path, *setup: str, python: str = sys.executable, **more: Any) -> JobPlan:
    return toy_plan(run_dir, **{"job_id": "job", "nodes": 2, "python": python, "setup": setup, **more})


# ---- the shell before the agent ----


def prepare(folder: Path, *setup: str, python: str = sys.executable) -> tuple[subprocess.CompletedProcess[str], RunDir]:
    """Runs a node's script; its "agent" prints what it sees."""
    run = RunDir(folder / "it's a run")
    run.control("job").path.mkdir(parents=True)
    show = (python, "-c", "import os, sys; print(sys.argv[1], os.environ.get('FROM_SETUP'), os.getcwd())")
    script = nodescript.node_script(plan(run.path, *setup, python=python), show)
    path = folder / "node.sh"
    path.write_text(script)
    done = subprocess.run(["bash", str(path), "1"], capture_output=True, text=True, timeout=60)
    return done, run


def ended(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.control("job").ended.read_text())
    return found


def test_setup_lines_are_verbatim_and_change_the_agents_world(tmp_path: Path) -> None:
    lines = ("f() { export FROM_SETUP=\"$1 and 'more'\"; }", "cat <<X | grep -q two\none\ntwo\nX", 'f "a  b"', "cd /")
    done, run = prepare(tmp_path, *lines)
    assert (done.returncode, done.stdout) == (0, "1 a  b and 'more' /\n")
    assert not run.control("job").ended.exists()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("false", 1),
        ("no-such-command-at-all", 127),
        ("exit 4", 4),
        ("true && (exit 3)", 3),
        ('echo "a\\b" | grep z', 1),
    ],
)
def test_a_line_that_fails_ends_the_job(tmp_path: Path, line: str, code: int) -> None:
    done, run = prepare(tmp_path, "FROM_SETUP=1", line, "echo never")
    assert (done.returncode, done.stdout) == (93, "")
    words = f"node 1 ({socket.gethostname()}): setup line 2, `{line}`, ended with {code}. Try it in a shell there."
    assert done.stderr.splitlines()[-1] == words
    assert (ended(run)["state"], ended(run)["exit_code"], ended(run)["reason"]) == ("failed", 93, words)
    (event,) = read_jsonl(run.events)
    assert (event["type"], event["reason"]) == ("ended", words)
    assert [path.name for path in run.control("job").path.iterdir()] == ["ended.json"]
    assert run.control("job").ended.stat().st_mode & 0o777 == 0o600


def test_the_first_word_stays(tmp_path: Path) -> None:
    control = RunDir(tmp_path / "it's a run").control("job")
    done, run = prepare(tmp_path, 'echo \'{"state": "done"}\' > "$dtrain_ended"', "false")
    assert done.returncode == 93
    assert ended(run) == {"state": "done"}
    assert list(read_jsonl(run.events)) == []
    assert control.path.is_dir()


def fake_python(folder: Path, body: str) -> str:
    path = folder / "py thon"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


OLD = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "No such file or directory"),
        (f'exec "{sys.base_prefix}/bin/python3" -SE "$@"', "has no dtrain that can be imported: No module"),
        (f'exec "{sys.executable}" -c "{OLD}" "$2"', "is Python 3.9, and dtrain needs 3.11 or newer"),
        (f'exec "{sys.executable}" "$1" "$2" 0.0.1', f"has dtrain {VERSION}, but the job was submitted with 0.0.1"),
    ],
)  # fmt: skip
def test_a_python_that_can_t_be_the_agents(tmp_path: Path, body: str | None, words: str) -> None:
    python = fake_python(tmp_path, body) if body else str(tmp_path / "py thon")
    done, run = prepare(tmp_path, "true", python=python)
    assert done.returncode == 93
    said = ended(run)["reason"]
    assert said.startswith(f"node 1 ({socket.gethostname()}): {python}: {words}")
    assert said.endswith(f" (after setup: true). Set it to one that has dtrain {VERSION}.")


def test_an_agent_of_another_version_ends_the_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.control("job").path.mkdir(parents=True)
    run.job.write_text(json.dumps(plan(tmp_path, version="0.0.1").to_json()))
    command = [sys.executable, "-m", "dtrain.runtime.agent", "--run-dir", str(tmp_path), "--job-id", "job"]
    done = subprocess.run([*command, "--node-rank", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 93
    assert f"has dtrain {VERSION}, but the job was submitted with 0.0.1" in ended(run)["reason"]
    assert ended(run)["reason"] in next(read_jsonl(run.events))["reason"]


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{VERSION}"\n' in text


def test_render_shows_the_script_and_needs_no_other_file() -> None:
    text = LocalBackend().render(plan(Path("/runs/x y"), "module load cuda", "export A='b c'"))
    assert "\nmodule load cuda\n" in text
    assert "\nexport A='b c'\n" in text
    assert "bash '/runs/x y/control/job/node.sh' 1 </dev/null" in text
    assert LocalBackend().preload(plan(Path("/runs/x"), "true", workers="warm")) is None


# ---- the same before a launch ----

CONFIG = """\
model: mine.f
data: {train: mine.f, batch_size: 1}
optimizer: mine.g
train: {steps: 1}
cluster: {setup: ["export FROM_SETUP=1", LINE]}
"""


def problems(folder: Path, line: str, module: str = "", python: str = sys.executable) -> list[tuple[str, str, str]]:
    (folder / "mine.py").write_text(f"{module}\ndef f(): ...\ndef g(params): ...\n")
    (folder / "cfg.yaml").write_text(CONFIG.replace("LINE", json.dumps(line)))
    found = check_targets(load_config("cfg.yaml"), python, [str(folder)], timeout_s=30)
    return [(problem.where, problem.key, problem.message) for problem in found]


@pytest.mark.slow
def test_targets_are_imported_in_the_world_of_the_setup(tmp_path: Path) -> None:
    source = "import os\nassert os.environ['FROM_SETUP'] + os.environ['MORE'] == '12'"
    noisy = 'export MORE=2; echo \'{"refused": "x", "message": "y"}\'; cat'
    assert problems(tmp_path, noisy, source) == []
    assert "AssertionError" in problems(tmp_path, "export MORE=3", source)[0][2]


def test_a_launch_finds_what_would_fail_on_the_nodes(tmp_path: Path) -> None:
    ((where, key, message),) = problems(tmp_path, "exit 7")
    assert (where, key) == ("cfg.yaml:5", "cluster.setup.1")
    assert message == "setup line 2, `exit 7`, ended with 7. Try it in a shell there."
    ((_, key, message),) = problems(tmp_path, "true", python="/no/such/python")
    assert key == "cluster.python"
    assert message.startswith("/no/such/python: No such file or directory (after setup: ")


# ---- interface and ports ----

FOUND = [
    Interface(name="lo", address="127.0.0.1"),
    Interface(name="ib0", address="10.1.2.3"),
    Interface(name="ib0", address="fd00::3"),
]


@pytest.mark.parametrize(
    ("asked", "address"),
    [("ib0", "10.1.2.3"), ("10.0.0.0/8", "10.1.2.3"), ("127.0.0.1", "127.0.0.1"), ("fd00::/8", "fd00::3")],
)
def test_pick(asked: str, address: str) -> None:
    assert pick(asked, FOUND).address == address


@pytest.mark.parametrize(
    ("asked", "words"),
    [("ib1", "there is no interface ib1"), ("11.0.0.0/8", "no interface has an address in 11.0.0.0/8")],
)
def test_pick_names_what_there_is(asked: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pick(asked, FOUND)
    assert f"{words}. There are: lo (127.0.0.1), ib0 (10.1.2.3), ib0 (fd00::3)." in str(caught.value)


def test_this_machines_interfaces() -> None:
    found = list_interfaces()
    assert Interface(name="lo", address="127.0.0.1") in found
    for interface in found:
        listening_socket(interface.address, None).close()
    assert network_of("lo") is None


def test_ports_come_from_the_range_until_it_is_exhausted() -> None:
    with listening_socket("127.0.0.1", None) as probe:
        first = int(probe.getsockname()[1])
    ports = (first, first + 1)
    with listening_socket("127.0.0.1", ports) as one, listening_socket("127.0.0.1", ports) as two:
        assert {one.getsockname()[1], two.getsockname()[1]} == set(ports)
        with pytest.raises(UsageError, match=f"all 2 ports {first} to {first + 1} of 127.0.0.1 are taken"):
            listening_socket("127.0.0.1", ports)


@pytest.mark.parametrize(
    ("interface", "address", "environ", "expected"),
    [
        ("ib0", "10.0.0.1", {}, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}),
        ("ib0", "10.0.0.1", {"NCCL_SOCKET_IFNAME": "eth"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ("lo", "127.0.0.1", {}, {"GLOO_SOCKET_IFNAME": "lo"}),
        ("", "127.0.0.1", {}, {}),
    ],
)
def test_workers_are_told_their_interface(interface: str, address: str, environ: Any, expected: Any) -> None:
    env = WorkerEnv(
        run_dir="", name="", job_id="", attempt=1, global_rank=0, local_rank=0, node_rank=0, world_size=1,
        local_world_size=1, num_nodes=1, master_addr=address, master_port=1, device="cpu", interface=interface,
    )  # fmt: skip
    assert env.traffic_environ(environ) == expected
    assert WorkerEnv.from_environ(env.to_environ()) == env


# ---- secrets ----


def test_redaction() -> None:
    redact = redactor({"TOKEN": TOKEN, "KEY": "line one\nline two\n", "SHORT": "ab", "ABSENT": ""})
    url = redactor({"TOKEN": "p/q?r&s tu"})
    assert url.line(b"https://h/p%2Fq%3Fr%26s%20tu") == b"https://h/[TOKEN]"
    assert redact.line(b"x=" + TOKEN.encode() + b"; line two\xff ab") == b"x=[TOKEN]; [KEY]\xff ab"
    report = {"message": f"bad {TOKEN}", "evidence": ["line one"], "data": {"k": 1}, "step": None}
    assert redact.record(report) == {"message": "bad [TOKEN]", "evidence": ["[KEY]"], "data": {"k": 1}, "step": None}
    lines: list[bytes] = []
    splitter = LineSplitter(lines.append, redact=redact.line)
    for byte in f"a {TOKEN} b\n".encode():
        splitter.feed(bytes([byte]))
    assert lines == [b"a [TOKEN] b"]
    assert list(splitter.tail) == ["a [TOKEN] b"]


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        (["cluster.env.A=x-${env:API_TOKEN}"], "cluster.env.A", "holds the value of the secret API_TOKEN"),
        ([f"model.key={TOKEN}"], "model.key", "holds the value of the secret API_TOKEN"),
        (["cluster.env.API_TOKEN=other1"], "cluster.secrets.0", "is in cluster.env too"),
        ([f"cluster.secrets=[{TOKEN}]"], "cluster.secrets.0", "expects the name of an environment variable"),
        (["cluster.secrets=[API_TOKE]"], "cluster.secrets.0", "API_TOKE is not set here"),
        (["cluster.secrets=[API_TOKE]"], "cluster.secrets.0", "Did you mean API_TOKEN?"),
        ([f"cluster.secrets=[API_TOKEN={TOKEN}]"], "cluster.secrets.0", "expects the name of an environment variable"),
        (["cluster.secrets=['A=file:']"], "cluster.secrets.0", "expects the name of an environment variable"),
        (["cluster.secrets=['A=file:key']"], "cluster.secrets.0", "key depends on the folder that one is in."),
        (["cluster.secrets=['A=file:~/absent']"], "cluster.secrets.0", "/absent: No such file or directory."),
        (["cluster.secrets=['A=file:~/empty']"], "cluster.secrets.0", "/empty is empty."),
        (["cluster.secrets=['A=file:~/binary']"], "cluster.secrets.0", "/binary can't be the value of a variable"),
        (["cluster.secrets=['A=file:~/key']", "cluster.env.A=x"], "cluster.secrets.0", "A is in cluster.env too"),
        (["cluster.secrets=['A=file:~/key']", f"cluster.env.B={TOKEN}"], "cluster.env.B", "the value of the secret A"),
    ],
)
def test_a_secret_that_would_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], key: str, message: str
) -> None:
    monkeypatch.setenv("API_TOKEN", TOKEN)
    for name, raw in {"empty": b"\n\n", "binary": b"a\0b", "key": TOKEN.encode()}.items():
        (Path(os.environ["HOME"]) / name).write_bytes(raw)
    (tmp_path / "cfg.yaml").write_text(
        "model: {_target_: m.N}\ndata: {train: m.D, batch_size: 1}\noptimizer: m.o\ntrain: {steps: 1}\n"
        "cluster: {secrets: [API_TOKEN]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config("cfg.yaml", words)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message
    assert TOKEN not in str(caught.value)


TOY = """
import os, sys, torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        seen = [os.environ[name] for name in ("API_TOKEN", "FROM_SETUP", "GLOO_SOCKET_IFNAME", "MASTER_PORT")]
        print("seen", *seen, flush=True)
        print("told", os.environ["API_TOKEN"], file=sys.stderr, flush=True)
    def forward(self, x):
        return self.line(x)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        if os.path.exists("fail"):
            raise RuntimeError("401 for " + os.environ["API_TOKEN"])
        return torch.tensor([i / 8.0]), torch.tensor([i / 4.0])
def loss(output, batch): return ((output - batch[1]) ** 2).mean()
"""
TOY_CONFIG = """
model: toy.Model
loss: toy.loss
data: {train: toy.Data, batch_size: 4}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train: {steps: 3}
cluster: {nodes: 2, secrets: [API_TOKEN], setup: ["export FROM_SETUP=kept"], interface: 127.0.0.0/8}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("API_TOKEN", TOKEN)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(TOY_CONFIG)
    return tmp_path / "runs" / "toy"


@pytest.mark.e2e
def test_a_run_with_all_of_it(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers see the secret and what setup exported, on ports of the range; nothing that is written shows the secret,
    not even a failure whose message holds it."""
    with listening_socket("127.0.0.1", None) as probe:
        first = int(probe.getsockname()[1])
    words = [f"cluster.port_range=[{first}, {first + 9}]"]
    assert cli.main(["launch", "toy.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "1 line of bash on each node" in said
    log = (toy / "logs" / "a0001" / "node-0.log").read_text()
    seen = next(line for line in log.splitlines() if "] seen " in line).split()
    assert seen[3:6] == ["[API_TOKEN]", "kept", "lo"]
    assert first <= int(seen[6]) <= first + 9
    (toy.parent.parent / "fail").touch()
    assert cli.main(["launch", "toy.yaml", *words, "train.steps=5"]) == 93
    failure = json.loads((toy / "failure.json").read_text())
    assert "401 for [API_TOKEN]" in failure["message"]
    written = [path for path in toy.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    shown = capsys.readouterr()
    assert written == []
    assert TOKEN not in said + shown.out + shown.err
    assert cli.main(["launch", "toy.yaml", "--dry-run", "--fresh"]) == 0
    assert TOKEN not in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_a_secret_from_a_file(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    """Not exported, read by the check of the targets and by each worker, also where it lies beside the code, which is
    copied; a new one is taken at the next start."""
    monkeypatch.delenv("API_TOKEN")
    key = toy.parent.parent / "key.py"
    words = [f"cluster.secrets=['API_TOKEN=file:{key}']", f"recovery.workers={workers}", "cluster.interface=auto"]
    for number, steps in ((1, 3), (2, 6)):
        secret = f"{TOKEN}/{number}"
        key.write_text(secret + "\n")
        assert cli.main(["launch", "toy.yaml", *words, f"train.steps={steps}"]) == 0
        shown = capsys.readouterr()
        assert "; without key.py" in shown.out
        log = (toy / "logs" / f"a000{number}" / "node-1.log").read_text()
        assert "seen [API_TOKEN] kept" in log
        assert "told [API_TOKEN]" in log
        assert not [path for path in toy.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
        with tarfile.open(next((toy / "code").iterdir())) as archive:
            assert [Path(name).name for name in archive.getnames() if name.endswith(".py")] == ["toy.py"]
        assert TOKEN not in shown.out + shown.err


@pytest.mark.e2e
def test_a_secret_that_a_node_does_not_have_ends_the_job(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where a job is submitted from a shell that did not export it, or a home is not mounted."""
    (toy.parent.parent / "key").write_text(TOKEN)
    words = [f"cluster.secrets=[API_TOKEN, 'OTHER=file:{toy.parent.parent}/key']"]
    assert cli.main(["launch", "toy.yaml", *words, "cluster.setup=[unset API_TOKEN]"]) == 93
    assert "cluster.secrets: API_TOKEN is not set. Export it" in capsys.readouterr().out


@pytest.mark.e2e
def test_ports_that_are_all_taken_end_the_job(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening_socket("127.0.0.1", None) as one:
        first = int(one.getsockname()[1])
        with listening_socket("127.0.0.1", (first, first + 5)) as two:
            ports = [first, int(two.getsockname()[1])]
            taken = [listening_socket("127.0.0.1", (port, port)) for port in range(ports[0] + 1, ports[1])]
            try:
                words = [f"cluster.port_range={ports}", "cluster.setup=[]"]
                assert cli.main(["launch", "toy.yaml", *words]) == 93
            finally:
                for server in taken:
                    server.close()
    said = capsys.readouterr().out
    assert (
        f"cluster.port_range: all {ports[1] - ports[0] + 1} ports {ports[0]} to {ports[1]} of 127.0.0.1 are taken"
        in said
    )


@pytest.mark.e2e
def test_a_node_whose_setup_fails_ends_the_job_for_all(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At submit and on the first node that comes it works, on the other one not."""
    line = "printf x >>tries; [ $(wc -c <tries) -lt 3 ]"
    assert cli.main(["launch", "toy.yaml", f"cluster.setup.0={json.dumps(line)}"]) == 93
    said = capsys.readouterr().out
    assert f"): setup line 1, `{line}`, ended with 1." in said
    assert "fix the cause, then continue:" in said
    assert not (toy / "failure.json").exists()
    assert os.path.getsize("tries") == 3  # it was not started again
