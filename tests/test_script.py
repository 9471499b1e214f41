"""One rank that is a script: what it finds around itself, and how its end is told. Ranks are forked from one process
that has imported torch, each runs a script of a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = """
import json, os, signal, socket, sys, torch
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime import script
from dtrain.runtime.childproc import leave

def env_of(run_dir, port, report_fd):
    return WorkerEnv(
        run_dir=run_dir, name="case", job_id="job-7", attempt=3, global_rank=0, local_rank=0, node_rank=0,
        world_size=1, local_world_size=1, num_nodes=1, master_addr="127.0.0.1", master_port=port, device="cpu",
        max_restarts=5, report_fd=report_fd,
    )

for line in sys.stdin:
    case = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reports = os.open(case["run_dir"] + "/reports", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(case["run_dir"] + "/" + name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.path[:0] = json.load(open(case["run_dir"] + "/job.json"))["sys_path"]
        env = env_of(case["run_dir"], port, reports)
        os.environ.update(env.to_environ())
        os.chdir(case["cwd"])
        leave(script.main(env))
    os.close(reports)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Ranks:
    """Runs one script after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", HARNESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, source: str, args: str = "", *, module: bool = False) -> Ended:
        self._number += 1
        run, code = self.folder / f"run-{self._number}", self.folder / f"code-{self._number}"
        run.mkdir()
        code.mkdir()
        (code / "train.py").write_text(source)
        (run / "job.json").write_text(json.dumps({"sys_path": [str(self.folder), str(code)]}))
        line = f"{'-m train' if module else 'train.py'} {args}".strip()
        (run / "config.yaml").write_text(json.dumps({"name": "case", "script": line, "checkpoint": {"url": "/ck"}}))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"run_dir": str(run), "cwd": str(self.folder)}) + "\n")
        self._process.stdin.flush()
        return Ended(code=int(self._process.stdout.readline()), run=run, folder=code)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Ended:
    def __init__(self, *, code: int, run: Path, folder: Path) -> None:
        self.code = code
        self.run = run
        self.folder = folder
        self.out = (run / "out").read_text()
        self.err = (run / "err").read_text()
        lines = (run / "reports").read_text().splitlines()
        self.failures: list[dict[str, Any]] = [r for r in map(json.loads, lines) if r["type"] == "failure"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


SURROUNDINGS = """
import json, os, pickle, signal, sys, __main__
class Mine: pass
pickle.dumps(Mine())
names = sorted(n for n in os.environ if n.startswith(("TORCH", "MASTER", "RANK", "LOCAL", "GROUP", "ROLE", "WORLD")))
print(json.dumps({
    "argv": sys.argv[1:], "script": sys.argv[0], "name": __name__, "file": __file__, "main": __main__.__file__,
    "path": sys.path[0], "cwd": os.getcwd(), "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    "environ": {n: os.environ[n] for n in names}, "beside": __import__("helper").WHO,
}))
"""


@pytest.mark.slow
def test_a_script_finds_what_torchrun_would_give_it(ranks: Ranks) -> None:
    (ranks.folder / "helper.py").write_text("WHO = 'the working directory, where a script does not look'\n")
    writes = "import pathlib; pathlib.Path(__file__).with_name('helper.py').write_text('WHO = 1')\n"
    ended = ranks.run(writes + SURROUNDINGS, "--lr 0.1 'two words'")
    assert (ended.code, ended.err, ended.failures) == (0, "", [])
    found = json.loads(ended.out)
    path = str(ended.folder / "train.py")
    assert found["argv"] == ["--lr", "0.1", "two words"]
    assert found["script"] == found["file"] == found["main"] == path
    assert found["name"] == "__main__"
    assert found["path"] == str(ended.folder)
    assert found["cwd"] == str(ranks.folder)
    assert found["sigterm"]
    assert found["beside"] == 1
    environ = found["environ"]
    assert environ["TORCHELASTIC_RUN_ID"] == "job-7"
    assert (environ["TORCHELASTIC_RESTART_COUNT"], environ["TORCHELASTIC_MAX_RESTARTS"]) == ("2", "5")
    assert set(environ) >= TORCHRUN


# What torch.distributed.run sets (torch 2.13, elastic/agent/server/local_elastic_agent.py), less its own error file.
TORCHRUN = {
    "LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
}  # fmt: skip


def test_the_list_is_torchruns_own() -> None:
    import inspect
    import re

    from torch.distributed.elastic.agent.server import local_elastic_agent

    source = inspect.getsource(local_elastic_agent)
    block = source[source.index("worker_env = {") :]
    assert set(re.findall(r'"([A-Z_]+)": ', block[: block.index("}")])) | {"LOCAL_RANK"} == TORCHRUN


def test_a_module(ranks: Ranks) -> None:
    ended = ranks.run("import sys\nprint(__name__, __spec__.name, sys.argv[1:])\n", "--x", module=True)
    assert (ended.code, ended.out) == (0, "__main__ train ['--x']\n")


def test_a_process_group_of_its_own(ranks: Ranks) -> None:
    """Behind MASTER_PORT there is a store for it to join, also twice."""
    ended = ranks.run(
        "import torch, torch.distributed as dist\n"
        "for _ in range(2):\n"
        "    dist.init_process_group('gloo')\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "    dist.destroy_process_group()\n"
    )
    assert (ended.code, ended.failures) == (0, [])


@pytest.mark.parametrize(
    ("source", "code", "retry"),
    [
        ("", 0, None),
        ("import sys; sys.exit()", 0, None),
        ("import sys; sys.exit(0)", 0, None),
        ("from dtrain.runtime import session; session.exit_stopped()", 85, None),
        ("import sys; sys.exit(3)", 3, True),
        ("import sys; sys.exit('no data')", 1, True),
        ("import sys; sys.exit(93)", 93, False),
    ],
)
def test_exit_codes_are_kept(ranks: Ranks, source: str, code: int, retry: bool | None) -> None:
    ended = ranks.run(f"def main():\n    {source or 'pass'}\nmain()\n")
    assert ended.code == code
    if retry is None:
        assert ended.failures == []
    else:
        (failure,) = ended.failures
        assert (failure["kind"], failure["retry"]) == ("exit", retry)
        assert failure["where"] == f"{ended.folder / 'train.py'}:2"


def test_an_exception_is_told_with_the_scripts_own_lines(ranks: Ranks) -> None:
    ended = ranks.run("import json\ndef main():\n    json.loads('{')\nmain()\n")
    (failure,) = ended.failures
    assert ended.code == 1
    assert failure["where"] == f"{ended.folder / 'train.py'}:3"
    assert failure["message"].startswith("json.decoder.JSONDecodeError")
    told = "\n".join(failure["evidence"])
    assert told.startswith(f'Traceback (most recent call last):\n  File "{ended.folder}/train.py", line 4')
    assert "runtime/script.py" not in ended.err
    assert "main()" in ended.err


def test_it_ends_as_the_interpreter_does(ranks: Ranks) -> None:
    """Threads are waited for, pools that nobody has shut down are, exit handlers come last."""
    ended = ranks.run(
        "import atexit, threading, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "atexit.register(print, 'handler')\n"
        "pool = ThreadPoolExecutor(1); pool.submit(time.sleep, 0.1)\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('end')\n"
    )
    assert (ended.code, ended.out) == (0, "end\nthread\nhandler\n")


def test_sigterm_ends_a_script_that_has_not_asked(ranks: Ranks) -> None:
    assert ranks.run("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nprint('lives')\n").code == -15


def test_a_script_that_asks_decides_itself(ranks: Ranks) -> None:
    ended = ranks.run(
        "import os, signal\n"
        "from dtrain.runtime import session\n"
        "print(session.stop_requested())\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(session.stop_requested())\n"
        "session.exit_stopped()\n"
    )
    assert (ended.code, ended.out) == (85, "False\nTrue\n")


def test_a_handler_of_its_own_stays(ranks: Ranks) -> None:
    ended = ranks.run(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('mine'))\n"
        "from dtrain.runtime import session\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert (ended.code, ended.out) == (0, "mine\n")


# ---- what it reports ----

REPORTING = """
import os, torch
from dtrain.runtime import session
session.report(4, loss=torch.tensor(0.5), lr=0.1, tokens=7)
session.report(5, loss=float("nan"))
pid = os.fork()
if pid == 0:
    print("child", session.attached()); os._exit(0)
os.wait()
print(session.checkpoint_url("elsewhere"))
for wrong in ({"step": 5}, {"step": 0}, {"step": 6.0}, {"step": 6, "loss": "low"}, {"step": 6, "attempt": 1}):
    try:
        session.report(**wrong)
    except ValueError as error:
        print(error)
"""


def test_reports_go_to_metrics_jsonl(ranks: Ranks) -> None:
    ended = ranks.run(REPORTING)
    assert ended.code == 0, ended.err
    first, second = (json.loads(line) for line in (ended.run / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 4, "attempt": 3, "loss": 0.5, "lr": 0.1, "tokens": 7}
    assert (second["loss"], second["nonfinite"]) == (None, {"loss": "nan"})
    assert second["step_s"] > 0
    child, url, *wrong = ended.out.splitlines()
    assert (child, url) == ("child None", "/ck")
    assert len(wrong) == 5


def test_reports_outside_dtrain_are_printed() -> None:
    code = "from dtrain.runtime import session\nsession.report(1, loss=0.25)\nprint(session.checkpoint_url('here'))\n"
    for rank, said in (("0", "step 1  loss 0.25\nhere\n"), ("1", "here\n")):
        environ = {**os.environ, "RANK": rank}
        found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert found.stdout == said
