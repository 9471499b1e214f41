"""cluster.slurm as a person writes it: what sbatch is asked for, and what is refused with its place, before anything
starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.cluster.errors import ConfigError
from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.slurmconfig import SlurmConfig, split_gpus, time_limit_s
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import make_plan
from dtrain.slurm.options import header_options, requested_gpus, srun_options


def plan_of(folder: Path, cluster: str, *overrides: str) -> JobPlan:
    """Of a config whose line 2 is the cluster section."""
    (folder / "train.py").write_text("")
    path = folder / "cfg.yaml"
    path.write_text(f"script: train.py\ncluster: {{backend: slurm, {cluster}}}\n")
    return make_plan(load_config(path, overrides), job_id="slurm-1", argv=[], cwd=str(folder))


def options(plan: JobPlan) -> dict[str, str]:
    words = (option.removeprefix("--").partition("=") for option in header_options(plan))
    return {name: value for name, _, value in words}


def test_without_anything_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "nodes: 3")
    assert options(plan) == {
        "job-name": "cfg", "nodes": "3", "ntasks-per-node": "1", "requeue": "", "signal": "B:USR1@120",
        "open-mode": "append", "export": "ALL",
    }  # fmt: skip
    assert (plan.procs_per_node, plan.gpus_per_node, plan.cpus_per_node, plan.threads_per_proc) == (1, 0, 0, 0)


def test_the_notation_of_sbatch_and_yaml(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, "slurm: {time: 1-12:00:00, mem: 0, qos: 7, sbatch: {nice: 100, exclusive: true, hold: false}}"
    )
    found = options(plan)
    assert (found["time"], found["mem"], found["qos"], found["nice"]) == ("1-12:00:00", "0", "7", "100")
    assert found["exclusive"] == ""
    assert "hold" not in found
    assert options(plan_of(tmp_path, "slurm: {time: 1:30:00}"))["time"] == "1:30:00"
    assert options(plan_of(tmp_path, "slurm: {time: 90, on_stop: none}"))["no-requeue"] == ""


@pytest.mark.parametrize(
    ("cluster", "gpus", "asked"),
    [
        ("gpus_per_node: 4", 4, {"gres": "gpu:4"}),
        ("slurm: {gpus_per_node: a100:4}", 4, {"gres": "gpu:a100:4"}),
        ("slurm: {gpus_per_node: 2, sbatch: {gres: tmpfs:1T}}", 2, {"gres": "gpu:2,tmpfs:1T"}),
        ("slurm: {sbatch: {gres: 'gpu:a100:2,gpu:v100:1'}}", 3, {"gres": "gpu:a100:2,gpu:v100:1"}),
        ("slurm: {sbatch: {gres: gpu}}", 1, {"gres": "gpu"}),
        ("nodes: 2, slurm: {sbatch: {gpus: 8}}", 4, {"gpus": "8"}),
        ("slurm: {sbatch: {gpus-per-task: h100:8}}", 8, {"gpus-per-task": "h100:8"}),
        ("gpus_per_node: 2, slurm: {sbatch: {gpus-per-socket: 1}}", 2, {"gpus-per-socket": "1"}),
        ("slurm: {sbatch: {gres: lustre:1}}", 0, {"gres": "lustre:1"}),
        ("slurm: {sbatch: {gpus: false}}", 0, {}),
    ],
)
def test_gpus(tmp_path: Path, cluster: str, gpus: int, asked: dict[str, str]) -> None:
    plan = plan_of(tmp_path, cluster)
    assert (plan.gpus_per_node, plan.procs_per_node) == (gpus, max(1, gpus))
    assert {name: value for name, value in options(plan).items() if "g" in name and name != "signal"} == asked


@pytest.mark.parametrize(
    ("cluster", "cpus", "threads"),
    [
        ("cpus_per_node: 16", 16, 0),
        ("procs_per_node: 4, cpus_per_proc: 8", 32, 8),
        ("procs_per_node: 4, cpus_per_proc: 8, cpus_per_node: 64", 64, 8),
    ],
)
def test_cores(tmp_path: Path, cluster: str, cpus: int, threads: int) -> None:
    plan = plan_of(tmp_path, cluster)
    assert (plan.cpus_per_node, plan.threads_per_proc) == (cpus, threads)
    assert options(plan)["cpus-per-task"] == str(cpus)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("slurm: {time: tomorrow}", 'slurm.time: expects minutes, H:MM:SS.*found "tomorrow"'),
        ("slurm: {time: 0}", "slurm.time: 0 minutes"),
        ("slurm: {gpus_per_node: 'a100:x'}", "slurm.gpus_per_node: expects a number, or a type"),
        ("slurm: {mem: lots}", "slurm.mem: expects megabytes"),
        ("slurm: {signal: USR1 60}", "slurm.signal: expects a signal"),
        ("slurm: {on_stop: retry}", "slurm.on_stop: expects one of"),
        ("slurm: {partitions: gpu}", "slurm.partitions: unknown key. Did you mean partition"),
        ("slurm: {exclude: 'n[1-'}", "slurm.exclude: n.1-: brackets do not match"),
        ("slurm: {constraint: \"a\\nb\"}", "slurm.constraint: has the control character U.000A"),
        ("slurm: {sbatch: {partition: gpu}}", "sbatch.partition: has a place of its own: cluster.slurm.partition"),
        ("slurm: {sbatch: {p: gpu}}", "sbatch.p: expects the long name of the option: partition"),
        ("slurm: {sbatch: {'--qos': x}}", "sbatch.--qos: expects the option without dashes: qos"),
        ("slurm: {sbatch: {'-N': 4}}", "sbatch.-N: expects the long name of the option: nodes"),
        ("slurm: {sbatch: {mail_type: END}}", "sbatch.mail_type: expects the option as sbatch writes it: mail-type"),
        ("slurm: {sbatch: {part: gpu}}", "sbatch.part: is short for partition. Write it out"),
        ("slurm: {sbatch: {nodes: 4}}", "sbatch.nodes: has a place of its own: cluster.nodes"),
        ("slurm: {sbatch: {cpus-per-task: 4}}", "sbatch.cpus-per-task: has a place of its own: cluster.cpus_per_node"),
        ("slurm: {sbatch: {array: 0-3}}", "sbatch.array: is not yours to set: a run is one job"),
        ("slurm: {sbatch: {output: x.log}}", "sbatch.output: is not yours to set"),
        ("slurm: {sbatch: {requeue: true}}", "sbatch.requeue: has a place of its own: cluster.slurm.on_stop"),
        ("slurm: {sbatch: {clusters: b}}", "sbatch.clusters: is not yours to set: dtrain asks the cluster"),
        ("slurm: {sbatch: {comment: ''}}", "sbatch.comment: is empty"),
        ("slurm: {sbatch: {comment: \"a\\nb\"}}", "sbatch.comment: has the control character U.000A"),
        ("slurm: {sbatch: {'x y': 1}}", "sbatch.x y: is no name of an option"),
        ("slurm: {mem: 4G, sbatch: {mem-per-cpu: 1G}}", "sbatch.mem-per-cpu: sbatch takes it or cluster.slurm.mem"),
        ("slurm: {gpus_per_node: 4, sbatch: {gpus: 4}}", "sbatch.gpus: asks for GPUs, as cluster.slurm.gpus_per_node"),
        ("slurm: {sbatch: {gpus: 4, gres: 'gpu:4'}}", "sbatch.gres: asks for GPUs, as gpus does"),
        ("gpus_per_node: 2, slurm: {gpus_per_node: 4}", "slurm.gpus_per_node: asks for 4 GPUs a node, but .* is 2"),
        ("nodes: 2, slurm: {sbatch: {gpus: 3}}", "sbatch.gpus: how many GPUs a node that is can't be told"),
        ("procs_per_node: 4, slurm: {gpus_per_node: 2}", "procs_per_node: 4 workers a node.* has 2.*ask for none"),
        ("slurm: {srun: {ntasks: 4}}", "srun.ntasks: is set by dtrain"),
        ("slurm: {srun: {c: 4}}", "srun.c: expects the long name"),
        ("container: {image: a.sif}", "container.runtime: is required"),
        ("container: {image: ' ', runtime: pyxis}", "container.image: is empty"),
        ("container: {image: a, runtime: pyxis, mounts: ['/a,/b']}", "mounts.0: expects SRC, SRC:DST"),
        ("container: {image: a, runtime: pyxis, mounts: [data]}", "mounts.0: expects an absolute path, found data"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, cluster: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, cluster)
    lines = str(caught.value).splitlines()
    assert [
        line for line in lines if re.search(rf"cfg\.yaml:2: cluster\.(slurm\.|container\.)?{message}", line)
    ] != [], lines


def test_secrets_need_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-123456")
    with pytest.raises(ConfigError, match=r"sbatch.export: NONE keeps cluster.secrets from the job"):
        plan_of(tmp_path, "secrets: [HF_TOKEN], slurm: {sbatch: {export: NONE}}")
    assert options(plan_of(tmp_path, "slurm: {sbatch: {export: NONE}}"))["export"] == "NONE"


def test_an_option_of_a_plugin_is_passed_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "slurm: {sbatch: {beegfs: on-demand}, srun: {container-mount-home: true, network: ib}}")
    assert options(plan)["beegfs"] == "on-demand"
    assert srun_options(plan.slurm) == ["--container-mount-home", "--network=ib"]


def test_a_site_sets_what_local_ignores_and_a_config_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("cluster: {slurm: {account: lab, sbatch: {mail-type: END, wckey: x}}}\n")
    monkeypatch.setenv("DTRAIN_SITE", str(site))
    found = options(plan_of(tmp_path, "slurm: {sbatch: {mail-type: false}}"))
    assert (found["account"], found["wckey"], "mail-type" in found) == ("lab", "x", False)
    site.write_text("cluster: {slurm: {sbatch: {nonsense_: x}}}\n")
    assert plan_of(tmp_path, "", "cluster.backend=local").backend == "local"


def test_words_of_the_command_line_reach_the_job(tmp_path: Path) -> None:
    plan_of(tmp_path, "nodes: 1")
    config = load_config(tmp_path / "cfg.yaml", ["cluster.env.A=b c"], nodes=3, backend="slurm")
    plan = make_plan(config, job_id="j", argv=[], cwd=str(tmp_path))
    assert plan.config == str(tmp_path / "cfg.yaml")
    assert plan.overrides == ("cluster.env.A=b c", "cluster.nodes=3", "cluster.backend=slurm")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-0", 172800), ("1-12:30", 131400),
        ("1-12:30:05", 131405), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_times(text: str, seconds: int | None) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "1-", "-5", "1.5"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="expects minutes"):
        time_limit_s(text)


def test_gpu_types() -> None:
    assert [split_gpus(text) for text in ("4", "a100:4", "nvidia_h100-80gb.1:2")] == [
        ("", 4), ("a100", 4), ("nvidia_h100-80gb.1", 2)
    ]  # fmt: skip
    cluster = ClusterConfig(backend="slurm", nodes=2, slurm=SlurmConfig(sbatch={"gpus": "a100:4,v100:2"}))
    assert requested_gpus(cluster) == 3
    assert requested_gpus(replace(cluster, nodes=4)) is None


@pytest.mark.parametrize(("asked", "signal"), [("time: 2", "30"), ("time: 1-0", "120"), ("time: UNLIMITED", "120")])
def test_the_reserve_before_the_time_limit(tmp_path: Path, asked: str, signal: str) -> None:
    assert options(plan_of(tmp_path, f"slurm: {{{asked}}}"))["signal"] == f"B:USR1@{signal}"
    assert options(plan_of(tmp_path, f"slurm: {{{asked}, signal: TERM@60}}"))["signal"] == "TERM@60"
