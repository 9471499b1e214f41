"""Inside a Slurm job, without one: what is read from its variables, what srun is called with, who owns the job."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.cluster import exits
from dtrain.cluster.configfile import DEFAULT
from dtrain.cluster.deaths import count_death
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.ports import listening_socket, ports_of_no_connection
from dtrain.cluster.rundir import Control, RunDir, read_json, read_jsonl, write_atomic
from dtrain.cluster.slurmconfig import SlurmConfig
from dtrain.launcher.inside import fit
from dtrain.slurm import stopping
from dtrain.slurm.driver import begin
from dtrain.slurm.jobenv import SlurmJob, fewest_cpus, slurm_job, step_environ, worker_environ
from dtrain.slurm.owner import Owner, claim, newest_owner, note_submission, slurm_job_id
from dtrain.slurm.records import JobRecord
from dtrain.slurm.steps import Traces, agent_script, last_words, start_step, step_argv

BATCH = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2],gpu-a",
    "SLURM_JOB_CPUS_PER_NODE": "72(x2),36",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_NAME": "a name",
    "SLURM_CLUSTER_NAME": "c",
}


def a_plan(run_dir: Path, nodes: int = 3) -> JobPlan:
    return JobPlan(
        name="run",
        run_dir=str(run_dir),
        job_id="slurm-1",
        backend="slurm",
        nodes=nodes,
        procs_per_node=2,
        gpus_per_node=0,
        threads_per_proc=0,
        python="/env/bin/python",
        argv=("dtrain",),
        cwd="/",
        sys_path=(),
        env={},
        checkpoint_url="file:///c",
        workers="warm",
        max_restarts_without_progress=3,
    )


@pytest.fixture
def control(tmp_path: Path) -> Control:
    made = RunDir(tmp_path / "run").control("slurm-1")
    made.path.mkdir(parents=True)
    return made


def owned(control: Control, **environ: str) -> Owner:
    owner = claim(control, {**BATCH, **environ}, ["node1", "node2", "gpu-a"], newest_owner(control))
    assert owner is not None
    return owner


def test_the_allocation_is_read_from_its_variables() -> None:
    job = slurm_job(BATCH)
    assert job is not None
    assert (job.id, job.restart, job.incarnation) == ("17", 0, "17.0")
    assert job.nodes == ("node1", "node2", "gpu-a")
    assert (job.cpus_per_node, job.gpus_per_node) == (36, 2)
    again = slurm_job({**BATCH, "SLURM_RESTART_COUNT": "3"})
    assert again is not None
    assert again.incarnation == "17.3"
    assert slurm_job({"HOME": "/"}) is None


@pytest.mark.parametrize(("text", "fewest"), [("4", 4), ("8(x3)", 8), ("72(x2),36,40(x10)", 36)])
def test_cores_of_the_smallest_node(text: str, fewest: int) -> None:
    assert fewest_cpus(text) == fewest


def test_cores_that_make_no_sense_are_named() -> None:
    with pytest.raises(UsageError, match=r"SLURM_JOB_CPUS_PER_NODE=4\(y2\)"):
        fewest_cpus("4(y2)")


def test_srun_hears_of_the_step_from_its_command_line_only() -> None:
    """An allocation made with --gpus-per-task=1 would leave a node's only task one GPU of four."""
    shape = dict.fromkeys(
        ["SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPU_BIND_LIST", "SLURM_GPUS"], "1"
    )
    kept = {"SLURM_JOB_ID": "17", "SLURM_CONF": "/c", "SLURM_JOB_NODELIST": "n", "PATH": "/bin"}
    assert step_environ({**shape, **kept, "HOSTNAME": "node1"}) == kept
    assert "/bin" in step_environ({"SLURM_JOB_ID": "17"})["PATH"]  # as after sbatch --export=NONE


def test_workers_are_not_tasks_of_the_step() -> None:
    place = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NODELIST", "SLURM_NODEID"]
    place += [
        "SLURM_GTIDS",
        "SLURM_TASKS_PER_NODE",
        "SRUN_DEBUG",
        "PMI_RANK",
        "PMIX_RANK",
        "SLURM_CPU_BIND",
        "SLURM_STEPID",
    ]
    kept = [
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "SLURM_JOB_NUM_NODES",
        "SLURM_CONF",
        "SLURM_TMPDIR",
        "SLURM_ARRAY_TASK_ID",
    ]
    kept += ["SLURM_RESTART_COUNT", "SLURM_SUBMIT_DIR", "SLURM_JOB_NAME", "SLURM_CLUSTER_NAME", "OMPI_MCA_btl", "HOME"]
    assert list(worker_environ(dict.fromkeys([*place, *kept], "1"))) == kept


def test_one_agent_a_node(tmp_path: Path) -> None:
    argv = step_argv(a_plan(tmp_path), ["node1", "gpu-a"], 36)
    assert argv[0] == "srun"
    assert "--overlap" not in argv
    wanted = {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=36", "--cpu-bind=none", "--no-kill"}
    assert wanted | {"--kill-on-bad-exit=0", "--nodelist=node1,gpu-a", "--export=ALL"} <= set(argv)
    again = step_argv(a_plan(tmp_path), ["gpu-a"], 36, ranks=[2], overlap=True)
    assert {"--overlap", "--nodes=1", "--nodelist=gpu-a"} <= set(again)
    assert again[-1] == "2"


@pytest.mark.parametrize(
    ("given", "environ", "rank"),
    [
        ([], {"SLURM_NODEID": "2"}, "2"),
        (["1"], {"SLURM_NODEID": "0"}, "1"),
        (["0", "2"], {"SLURM_NODEID": "1"}, "2"),  # node 1 is left out
    ],
)
def test_a_task_knows_its_node_rank_and_where_to_log(
    tmp_path: Path, given: list[str], environ: dict[str, str], rank: str
) -> None:
    """Whatever the run directory is called: the path of the log is the shell's affair, not a pattern of srun's."""
    odd = tmp_path / "a %t b$(id)'\n\\ü"
    (odd / "logs").mkdir(parents=True)
    plan = replace(a_plan(odd), python="/bin/echo")
    script = tmp_path / "node.sh"
    script.write_text(agent_script(plan, ("--incarnation", "4")))
    # echo stands for the Python: what the probe asks of it succeeds, and then it is called as the agent
    subprocess.run(["bash", str(script), *given], env={"PATH": "/bin", **environ}, check=True)
    said = (odd / "logs" / f"agent-{rank}.log").read_text()
    assert said.endswith(f"--job-id slurm-1 --incarnation 4 --node-rank {rank}\n")


def test_the_newest_claim_owns_the_job(control: Control) -> None:
    assert newest_owner(control) is None
    assert slurm_job_id(control) is None
    note_submission(control, "17")
    assert slurm_job_id(control) == "17"
    first = owned(control)
    assert (first.number, first.incarnation, first.nodes) == (1, "17.0", ("node1", "node2", "gpu-a"))
    assert claim(control, BATCH, ["node1"], None) is None, "the number is taken"
    second = owned(control, SLURM_JOB_ID="18", SLURM_RESTART_COUNT="2")
    assert newest_owner(control) == second
    assert second.number == 2
    assert slurm_job_id(control) == "18"


def ended(control: Control, code: int) -> None:
    control.ended.write_text(json.dumps({"state": "s", "exit_code": code, "reason": "", "step": 7, "at": 0.0}))


@pytest.mark.parametrize("code", [exits.DONE, exits.FAILED, exits.CANCELLED, exits.NEVER_RETRY])
def test_a_job_that_has_ended_is_not_started_by_a_requeue(tmp_path: Path, control: Control, code: int) -> None:
    owned(control)
    ended(control, code)
    assert begin(a_plan(tmp_path / "run"), owned(control, SLURM_RESTART_COUNT="1")) == code
    assert control.ended.exists()


def test_a_requeue_goes_on_with_what_is_known_of_the_run(tmp_path: Path, control: Control) -> None:
    plan = a_plan(tmp_path / "run")
    assert begin(plan, owned(control)) is None
    assert control.incarnation.read_text() == "1"
    assert not list(read_jsonl(RunDir(plan.run_dir).events))
    ended(control, exits.STOPPED)
    memory = {"attempt": 4, "running": False, "stuck": 2, "skip": [[3, 1]], "stop": "stop", "suspect": 2}
    (control.path / "memory.json").write_text(json.dumps(memory))
    control.node(0).write_text("{}")
    assert begin(plan, owned(control, SLURM_RESTART_COUNT="1")) is None
    assert not control.ended.exists()
    assert (read_json(control.path / "ended-0001.json") or {})["step"] == 7
    assert read_json(control.path / "memory.json") == {**memory, "stop": None, "suspect": None, "strikes": 0}
    assert not control.node(0).exists(), "its process is of another start, perhaps of another machine"
    assert control.incarnation.read_text() == "2"
    (event,) = read_jsonl(RunDir(plan.run_dir).events)
    assert (event["type"], event["restart"], event["slurm_job_id"]) == ("requeued", 1, "17")


def test_a_step_outlives_who_started_it_and_is_deaf_to_its_signals(tmp_path: Path) -> None:
    log, done = tmp_path / "srun.log", tmp_path / "done"
    program = f"echo hello; while [ ! -e {done} ]; do sleep 0.02; done; exit 7"
    step = start_step(["bash", "-c", program], log, {"PATH": "/bin:/usr/bin"})
    subprocess.run(["kill", "-TERM", str(step.pid)], check=True)
    subprocess.run(["kill", "-INT", str(step.pid)], check=True)
    time.sleep(0.1)
    assert step.liveness() == "alive"
    done.touch()
    while step.liveness() == "alive":
        time.sleep(0.02)
    assert log.read_text() == "hello\nsrun ended with 7\n"


def test_ports_lie_outside_of_those_for_connections() -> None:
    assert ports_of_no_connection("32768 60999") == (20_000, 32_767)
    assert ports_of_no_connection("15000 61000") == (61_001, 65_535)
    assert ports_of_no_connection("1024 65535") is None
    assert ports_of_no_connection("") is None


def test_a_taken_port_is_passed_over_wherever_the_search_begins() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = probe.getsockname()[1]
    ports = (first, first + 1)
    for _ in range(8):
        with listening_socket("127.0.0.1", ports) as one, listening_socket("127.0.0.1", ports) as two:
            assert {one.getsockname()[1], two.getsockname()[1]} == {first, first + 1}


def test_deaths_count_until_a_new_step(control: Control) -> None:
    assert [count_death(control, "x"), count_death(control, "x")] == [1, 2]
    (control.path / "memory.json").write_text(json.dumps({"reached": 5, "committed": 0}))
    assert [count_death(control, "x"), count_death(control, "x")] == [1, 2]


def test_agents_whose_status_moves_are_alive_whatever_slurm_says(tmp_path: Path, control: Control) -> None:
    """srun may be gone, and slurmctld may have taken the step off its list."""
    now = 0.0
    traces = Traces(a_plan(tmp_path / "run"), "17", clock=lambda: now)
    traces._is_listed = lambda: False  # type: ignore[method-assign]
    for now in (4.0, 8.0, 12.0):
        control.status.write_text(json.dumps({"seen_at": now}))
        assert traces.agents_may_live()
    now = 30.0
    assert not traces.agents_may_live()


def test_the_last_words_of_srun(tmp_path: Path) -> None:
    log = tmp_path / "srun.log"
    log.write_text("of another start\n")
    offset = log.stat().st_size
    with open(log, "a") as file:
        file.write("srun: cluster configuration lacks support for cpu binding\nsrun: error: nodes are busy\n\n")
    assert last_words(log, offset) == ["srun: error: nodes are busy"]


ALLOCATION = SlurmJob(id="17", restart=0, nodes=("a", "b", "c"), cpus_per_node=4, gpus_per_node=2)


def test_an_allocation_gives_what_is_asked_or_all_of_it() -> None:
    said = {"cluster.nodes": "cfg.yaml:3"}
    assert fit(ClusterConfig(nodes=2), said, ALLOCATION, whole=False).nodes == 2
    assert fit(ClusterConfig(), {"cluster.nodes": DEFAULT}, ALLOCATION, whole=False).nodes == 3
    assert fit(ClusterConfig(nodes=2), said, ALLOCATION, whole=True).nodes == 3
    with pytest.raises(UsageError, match=r"4, but this allocation \(Slurm job 17\) has 3 nodes.*--submit"):
        fit(ClusterConfig(nodes=4), said, ALLOCATION, whole=False)


def test_what_sbatch_was_to_be_asked_gives_way_to_what_it_gave() -> None:
    slurm = SlurmConfig(gpus_per_node="4", sbatch={"gres": "gpu:4", "comment": "x"})
    fitted = fit(ClusterConfig(nodes=2, slurm=slurm), {}, ALLOCATION, whole=True)
    wanted = ("cluster.gpus_per_node=2", "cluster.slurm.gpus_per_node=2", "cluster.slurm.sbatch.gres=gpu:2")
    assert fitted.overrides == wanted


def test_an_agent_of_an_earlier_start_ends(tmp_path: Path, control: Control) -> None:
    """One that was cut off, and has no way to know what became of the job but this file."""
    plan = replace(a_plan(tmp_path / "run", nodes=1), backend="local", workers="exec", python=sys.executable)
    RunDir(plan.run_dir).job.write_text(json.dumps(plan.to_json()))
    control.token.write_text("ab" * 32)
    control.incarnation.write_text("2")
    where = ("--run-dir", plan.run_dir, "--job-id", plan.job_id, "--node-rank", "0", "--incarnation", "1")
    argv = [sys.executable, "-P", "-m", "dtrain.runtime.agent", *where]
    agent = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert agent.returncode == 1
    assert "the job was started anew; node 0 of its earlier start ends" in agent.stderr
    assert not control.node(0).exists()
    assert not control.coordinator(1).exists()


def test_a_worker_that_hangs_does_not_hold_the_job_until_slurm_ends_it(
    tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000.0
    write_atomic(control.coordinator(1), json.dumps({"incarnation": 1}))
    running = JobRecord(job_id=17, state="RUNNING", ends_at=now + 100)
    monkeypatch.setattr(stopping, "look", lambda job: running)
    clock = iter([now, now + 71, now + 85, now + 89])
    stopper = stopping.Stopper(a_plan(tmp_path / "run"), "17", 1, [], clock=lambda: next(clock))
    seen = []
    for _ in range(4):
        stopper.poll()
        seen.append((control.stop(1).exists(), control.ended.exists()))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]
    ended = json.loads(control.ended.read_text())
    assert (ended["state"], ended["exit_code"]) == ("stopped", exits.STOPPED)
