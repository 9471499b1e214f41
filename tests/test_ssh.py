"""The ssh back end on real sshds: what is found before a launch, the same curve as on this machine, and what happens
when workers, machines and connections are lost. Nothing is left on any machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launched import CONFIG, DTRAIN, Launched
from sessions import processes_of
from sshhosts import SshHosts

from dtrain.cluster import exits
from dtrain.cluster.hostfile import parse_hosts
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.cluster.ssh import SshBackend
from dtrain.cluster.sshcall import call, ssh_argv
from dtrain.cluster.sshconfig import SshConfig, slots_of
from dtrain.cluster.sshscript import exported, kill_script, look_script, start_script

HOSTILE = "a 'b' \"c\" $(touch x) `d`\n\\e;f & , ünï"
PLAN = JobPlan(
    name="x; rm -rf ~", run_dir="/runs/x; rm -rf ~", job_id="ssh-1", backend="ssh", nodes=2, procs_per_node=2,
    gpus_per_node=0, threads_per_proc=3, python="/env/bin/python", argv=("dtrain", "launch"), cwd="/home/a b",
    sys_path=(), env={}, checkpoint_url="/runs/x/checkpoints", workers="warm", max_restarts_without_progress=3,
    hosts=("node1", "me@node2", "node3"), ssh_options=("-p", "2222"),
)  # fmt: skip


def test_a_host_file_of_open_mpi_and_of_deepspeed(tmp_path: Path) -> None:
    text = "# ours\nnode1 slots=4 max_slots=8\n\nme@node2 slots=4  # the new one\n[fe80::1] slots=4\nnode1 slots=2\n"
    hosts = parse_hosts(text.splitlines(), "hosts")
    assert [(host.name, host.slots) for host in hosts] == [("node1", 6), ("me@node2", 4), ("[fe80::1]", 4)]
    with pytest.raises(ValueError, match=r"node1 has 6 slots|node1 6, but every node"):
        slots_of(hosts)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    assert slots_of(SshConfig(hostfile=str(tmp_path / "hosts")).read_hosts()) == 2
    assert slots_of(SshConfig(hosts=("node1", "node2")).read_hosts()) is None


@pytest.mark.parametrize("line", ["-oProxyCommand=x", "node1 slots=x", "node1 slots=0", "a;b", "node1 cpus=3", "@x"])
def test_a_wrong_line_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(ValueError, match="hosts:2: "):
        parse_hosts(["node1", line], "hosts")


def test_a_dry_run_is_exact_and_quoted() -> None:
    text = SshBackend().render(PLAN)
    assert text == SshBackend().render(PLAN)
    first, second, spare = text.splitlines()[-3:]
    assert first.startswith("ssh -p 2222 -T ")
    assert " -- node1 'exec bash -c" in first
    assert second.endswith("# setsid bash '/runs/x; rm -rf ~/control/ssh-1/node.sh' 1 </dev/null "
                           ">>'/runs/x; rm -rf ~/logs/agent-1.log' 2>&1 &")  # fmt: skip
    assert " -- me@node2 " in second
    assert spare == "# spare: node3"


def test_what_goes_along_with_an_agent() -> None:
    mine = {"HF_HOME": "/hf", "PATH": "/bin", "XDG_CACHE_HOME": "/scratch", "NCCL_DEBUG": "WARN"}
    stays = {"HOME": "/root", "SSH_AUTH_SOCK": "/s", "XDG_RUNTIME_DIR": "/run", "BASH_FUNC_x%%": "() { :; }", "_": "x",
             "SLURM_JOB_ID": "1", "HOSTNAME": "login", "TERM": "xterm"}  # fmt: skip
    assert exported({**mine, **stays}) == mine


def test_values_arrive_as_they_are(ssh_hosts: SshHosts, tmp_path: Path) -> None:
    plan = replace(PLAN, run_dir=str(tmp_path / HOSTILE.replace("/", "")))
    script = tmp_path / "node.sh"
    script.write_text(f'echo "$1 $VALUE" >{tmp_path}/told')
    text = start_script(plan, str(script), 7, {"VALUE": HOSTILE})
    answer = call("node1", ssh_hosts.options, text, 30)
    assert answer.problem == ""
    deadline = time.monotonic() + 60
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "told").read_text() == f"7 {HOSTILE}\n"
    assert not list(tmp_path.rglob("x"))


def test_a_script_that_was_cut_short_is_not_run(ssh_hosts: SshHosts, tmp_path: Path) -> None:
    argv = ssh_argv("node1", ssh_hosts.options)
    text = f"touch {tmp_path}/first\ntouch {tmp_path}/sec"
    done = subprocess.run(argv, input=text.encode(), capture_output=True, timeout=30, check=False)
    assert done.returncode != 0
    assert not (tmp_path / "first").exists()


def test_processes_are_known_by_more_than_their_number(ssh_hosts: SshHosts) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        mine = ProcessId.of(process.pid)
        others = [replace(mine, started=mine.started + 1), replace(mine, boot="another")]
        assert call("node1", ssh_hosts.options, look_script([mine, *others]), 30).said == ("alive",)
        call("node1", ssh_hosts.options, kill_script(others, "KILL"), 30)
        assert mine.liveness() == "alive"
        call("node1", ssh_hosts.options, kill_script([mine], "KILL"), 30)
        assert process.wait(60) == -signal.SIGKILL
    assert call("node1", ssh_hosts.options, look_script([mine]), 30).said == ()


def test_why_a_machine_can_not_be_reached(ssh_hosts: SshHosts) -> None:
    options = ssh_hosts.options
    refused = call("node1", ["-p", str(_silent_port()), *options], "true", 30).problem
    assert "Connection refused" in refused
    assert "the port right" in refused
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        port = str(hung.getsockname()[1])
        assert "imed out" in call("node1", ["-p", port, "-o", "ConnectTimeout=1", *options], "true", 30).problem
    assert "no answer within 1 s" in call("node1", options, "sleep 30", 1).problem
    stranger = call("node1", ["-o", "UserKnownHostsFile=/dev/null", *options], "true", 30).problem
    assert "key verification failed" in stranger
    assert "by hand once" in stranger
    stranger_options = ["IdentityFile=/dev/null", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    anybody = [word for option in [*stranger_options, "HostName=127.0.0.1"] for word in ("-o", option)]
    denied = call("node1", ["-F", "/dev/null", "-p", str(ssh_hosts.ports["node1"]), *anybody], "true", 30).problem
    assert "Permission denied" in denied
    assert "ssh-copy-id node1" in denied
    broken = call("node1", options, "echo one; sleep 0.3; kill -KILL $PPID", 30)
    assert "the connection broke" in broken.problem
    assert broken.said[0] == "one"


def _silent_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def launched(ssh_hosts: SshHosts, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """launched(name, hosts) -> Launched; no hosts: on the local back end. What still goes on is cancelled."""
    made: list[Launched] = []

    def make(name: str, *hosts: str) -> Launched:
        config = tmp_path / f"{name}.json"
        ssh = {"backend": "ssh", "ssh": {"hosts": hosts, "options": ssh_hosts.options}} if hosts else {}
        config.write_text(json.dumps({**CONFIG, "cluster": {**CONFIG["cluster"], **ssh}}))
        made.append(Launched(run=RunDir(tmp_path / name), config=config))
        return made[-1]

    yield make
    for one in made:
        if one.run.job.exists():
            subprocess.run([DTRAIN, "cancel", one.run.path], stdout=subprocess.DEVNULL, timeout=100, check=False)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_same_curve_whatever_is_lost(launched: Callable[..., Launched], ssh_hosts: SshHosts) -> None:
    """A machine that fails twice and one that is lost, whose places spare ones take, then the terminal: bit for bit a
    local run's curve."""
    whole = launched("whole")
    assert whole.finish() == 0, whole.said

    hurt = launched("hurt", "node1", "node2", "node3", "node4")
    process = hurt.launch()
    for attempt, step in ((1, 6), (2, 8)):
        hurt.until_step(step)
        workers = [found for found in processes_of({hurt.agent(1)}) if found.pid != hurt.agent(1)]
        os.kill(max(workers, key=lambda found: found.create_time()).pid, signal.SIGKILL)
        hurt.until(lambda: len(hurt.events("attempt_started")) == attempt + 1, "another attempt")  # noqa: B023
    assert read_json(hurt.control.path / "hosts.json") == {"0": "node1", "1": "node3"}
    assert "node3 takes the place of node2" in str(hurt.events("node_replaced"))

    hurt.until_step(14)
    lost = hurt.agent(1)
    ssh_hosts.cut_off("node3")
    try:
        os.kill(lost, signal.SIGKILL)
        hurt.until(lambda: len(hurt.events("attempt_started")) == 4, "attempt 4 after the loss of a machine")
        assert read_json(hurt.control.path / "hosts.json") == {"0": "node1", "1": "node4"}
        hurt.until_step(22)
        process.send_signal(signal.SIGHUP)  # the terminal is closed
        process.wait(60)
        hurt.until(lambda: hurt.control.ended.exists(), "the end, which nobody looks at")
    finally:
        ssh_hosts.boot("node3")
    assert hurt.curve() == whole.curve()


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_detached_then_asked_and_cancelled(launched: Callable[..., Launched], ssh_hosts: SshHosts) -> None:
    job = launched("long", "node1", "node2")
    assert job.finish("--detach", "train.steps=100000") == 0, job.said
    assert "dtrain attach" in job.said
    job.until_step(3)
    status = json.loads(subprocess.check_output([DTRAIN, "status", "--json", job.run.path]))
    assert (status["state"], status["world_size"]) == ("running", 2)
    again = launched("long", "node1", "node2")
    assert again.finish("train.steps=100000") == exits.USAGE
    members = processes_of({job.agent(0), job.agent(1)})
    done = subprocess.run([DTRAIN, "cancel", job.run.path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, exits.CANCELLED), done
    assert job.events("ended")[-1]["state"] == "cancelled"
    deadline = time.monotonic() + 60
    while any(process.is_running() for process in members):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.e2e
def test_what_is_wrong_is_said_before_anything_starts(
    launched: Callable[..., Launched], ssh_hosts: SshHosts, tmp_path: Path
) -> None:
    job = launched("wrong", "node1", "node2")
    ssh_hosts.cut_off("node2")
    try:
        assert job.finish() == exits.USAGE
        assert "cluster.ssh: node2: " in job.said
        assert "Connection refused" in job.said
    finally:
        ssh_hosts.boot("node2")
    assert job.finish("cluster.python=/no/such/python") == exits.USAGE
    assert "node1: cluster.python: /no/such/python" in job.said
    assert "node2: cluster.python" in job.said
    assert job.finish("cluster.nodes=3") == exits.USAGE
    assert "3 nodes, but 2 listed (node1, node2)" in job.said
    assert not job.run.job.exists()
