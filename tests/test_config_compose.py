"""Whole configs: what load_config makes of a file, options and words; round trip, identity, plan, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtrain.cluster.errors import ConfigError
from dtrain.launcher import cli, reference
from dtrain.launcher.compose import LaunchConfig, diff_identity, dump_resolved, load_config
from dtrain.launcher.plan import make_plan
from dtrain.launcher.topology import NodeShape, shape_nodes
from dtrain.runtime.config import (
    Interval,
    OptimizerConfig,
    ParamGroup,
    ScheduleConfig,
    Target,
    parse_interval,
    read_run_config,
)
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.degrees import AXES, Degrees
from dtrain.strategies.layout import check_layout, degrees_of

REPO = Path(__file__).resolve().parent.parent

TEXT = """\
run_dir: out/${name}
model: {_target_: m.Net, width: 8, sizes: [1, 2], extra: {a: null}}
data:
  train: m.Data
  eval: {_target_: m.Data, split: eval}
  batch_size: 8
optimizer:
  _target_: torch.optim.AdamW
  lr: 1e-4
  groups:
    - {match: "*.bias", weight_decay: 0}
train: {steps: 10, seed: 5}
schedule: cosine
strategy: fsdp
checkpoint: {every: 10min}
cluster: {env: {LEVEL: 3}}
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "cfg.yaml"
    path.write_text(TEXT)
    return path


def test_sections(tmp_path: Path) -> None:
    config = load_config("cfg.yaml", nodes=2)
    assert (config.name, config.run_dir, config.path) == ("cfg", f"{tmp_path}/out/cfg", f"{tmp_path}/cfg.yaml")
    assert config.run.model.target == Target(target="m.Net", kwargs={"width": 8, "sizes": [1, 2], "extra": {"a": None}})
    assert config.run.model.target.where == "cfg.yaml:2"
    assert config.run.data.train == Target(target="m.Data", kwargs={})
    assert config.run.optimizer == OptimizerConfig(
        target=Target(target="torch.optim.AdamW", kwargs={"lr": 1e-4}),
        groups=(ParamGroup(match="*.bias", settings={"weight_decay": 0}),),
    )
    assert config.strategy == StrategyConfig(name="fsdp")
    assert config.cluster.nodes == 2
    assert config.cluster.env == {"LEVEL": "3"}
    assert config.run.checkpoint.url == f"{tmp_path}/out/cfg/checkpoints"


def test_origins() -> None:
    config = load_config("cfg.yaml", ["train.seed=7", "optimizer.groups.0.lr=1"], nodes=2, name="other")
    expected = {
        "name": "--name", "run_dir": "cfg.yaml:1", "model.extra.a": "cfg.yaml:2", "data.eval.split": "cfg.yaml:5",
        "data.shuffle": "default", "optimizer.groups.0.match": "cfg.yaml:11", "optimizer.groups.0.lr": "command line",
        "train.seed": "command line", "train.steps": "cfg.yaml:12", "schedule.name": "cfg.yaml:13",
        "checkpoint.url": "default", "cluster.nodes": "--nodes", "cluster.env.LEVEL": "cfg.yaml:16",
    }  # fmt: skip
    assert {key: config.origins[key] for key in expected} == expected
    assert config.resolved["run_dir"].endswith("/out/other")


def test_options_win_over_words_over_file() -> None:
    assert load_config("cfg.yaml", ["name=a"], name="b").name == "b"
    assert load_config("cfg.yaml", ["name=a", "name=c"]).name == "c"
    assert load_config("cfg.yaml", run_dir="here").run_dir == os.path.abspath("here")


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        (["schedule.warmup=2"], ("cosine", 2)),
        (["schedule=linear", "schedule.warmup=2"], ("linear", 2)),
        (["schedule={name: linear, warmup: 3}", "schedule=cosine"], ("cosine", 0)),
    ],
)
def test_short_forms_merge_and_replace(words: list[str], schedule: tuple[str, int]) -> None:
    found = load_config("cfg.yaml", words).run.schedule
    assert isinstance(found, ScheduleConfig)
    assert (found.name, found.warmup) == schedule


def test_a_short_form_replaces_all_of_a_mapping_in_the_file(file: Path) -> None:
    file.write_text(TEXT.replace("strategy: fsdp", "strategy: {name: fsdp, shard: 1}"))
    assert load_config("cfg.yaml", ["strategy=ddp"]).strategy == StrategyConfig(name="ddp")
    with pytest.raises(ConfigError, match="shard 1 does not go with ddp"):
        load_config("cfg.yaml", ["strategy.name=ddp"])


def test_a_schedule_of_ones_own() -> None:
    found = load_config("cfg.yaml", ["schedule={_target_: torch.optim.lr_scheduler.StepLR, step_size: 3}"]).run.schedule
    assert found == Target(target="torch.optim.lr_scheduler.StepLR", kwargs={"step_size": 3})
    assert load_config("cfg.yaml", ["schedule=mine.schedule"]).run.schedule == Target(target="mine.schedule", kwargs={})


def test_references_see_defaults_and_the_absolute_run_dir(tmp_path: Path) -> None:
    config = load_config("cfg.yaml", ["name=n${cluster.nodes}-${schedule.warmup}", "model.width=${data.batch_size}",
                                      "checkpoint.url=${run_dir}/c"], nodes=3)  # fmt: skip
    assert config.name == "n3-0"
    assert config.run.model.target.kwargs["width"] == 8
    assert config.run.checkpoint.url == f"{tmp_path}/out/n3-0/c"
    assert load_config("cfg.yaml", ["checkpoint.url=kept/here"]).run.checkpoint.url == f"{tmp_path}/kept/here"
    assert load_config("cfg.yaml", ["checkpoint.url=file:///kept"]).run.checkpoint.url == "file:///kept"


AWKWARD: dict[str, Any] = {
    "a": "1e-4", "b": "yes", "c": "${name}", "d": "~/x", "e": "2026-01-01", "f": 1e-05, "g": [], "h": {},
    "i": "line\nline\n", "j": "0899", "k": None, "l": True, "m": [[1, "#x"], {"n": "a: b"}], "o": "", "p": "ä\t'\"",
    "q": 1e300, "r": "null",
}  # fmt: skip


def test_resolved_config_is_read_back_equal(tmp_path: Path) -> None:
    words = [f"model.{key}={json.dumps(value).replace('${', '$${')}" for key, value in AWKWARD.items()]
    config = load_config("cfg.yaml", words)
    home = {"d": os.path.expanduser("~/x")}
    assert {key: config.run.model.target.kwargs[key] for key in AWKWARD} == AWKWARD | home
    (tmp_path / "resolved.yaml").write_text(dump_resolved(config))
    assert read_run_config(tmp_path / "resolved.yaml") == (config.run, config.strategy)
    assert load_config("resolved.yaml", ["model.c=x"]).cluster == config.cluster
    assert yaml.safe_load(dump_resolved(config)) == config.resolved  # other tools read it, too


def test_read_run_config_reports_every_problem(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\nmodel: m.Net\ndata: 3\nstrategy: {shard: 0}\n")
    with pytest.raises(ConfigError) as caught:
        read_run_config(tmp_path / "bad.yaml")
    assert [problem.key for problem in caught.value.problems] == ["data", "optimizer", "train", "strategy.shard"]


# ---- identity ----


def _with(*words: str) -> LaunchConfig:
    return load_config("cfg.yaml", words)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model.width=9", "model.width: 8 -> 9"),
        ("model.depth=2", "model.depth: (not there) -> 2"),
        ("data.train=m.Other", "data.train._target_: m.Data -> m.Other"),
        ("data.shuffle=false", "data.shuffle: true -> false"),
        ("data.batch_size=9", "data.batch_size: 8 -> 9"),
        ("optimizer.groups.0.weight_decay=1", "optimizer.groups.0.weight_decay: 0 -> 1"),
        ("loss=m.loss", "loss._target_: (not there) -> m.loss"),
        ("count=m.count", "count._target_: (not there) -> m.count"),
        ("train.seed=6", "train.seed: 5 -> 6"),
    ],
)
def test_identity(word: str, line: str) -> None:
    old, new = _with(), _with(word)
    assert diff_identity(old.resolved, new.resolved) == ([line], [])


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.steps=20", "train.steps: 10 -> 20"),
        ("strategy=ddp", "strategy.name: fsdp -> ddp"),
        ("data.workers=2", "data.workers: 0 -> 2"),
        ("data.eval.split=test", "data.eval.split: eval -> test"),
        ("cluster.nodes=3", "cluster.nodes: 1 -> 3"),
    ],
)
def test_what_may_change_on_the_way(word: str, line: str) -> None:
    old, new = _with(), _with(word)
    assert diff_identity(old.resolved, new.resolved) == ([], [line])


def test_a_key_that_an_older_version_did_not_have_is_no_difference() -> None:
    resolved = _with().resolved
    older = {key: value for key, value in resolved.items() if key != "count"}
    assert diff_identity(older, resolved) == ([], [])


# ---- layout, plan ----


@pytest.mark.parametrize(
    ("strategy", "nodes", "procs", "keys"),
    [
        (StrategyConfig(), 3, 2, []),
        (StrategyConfig(shard=2), 1, 2, ["strategy.shard"]),
        (StrategyConfig(name="single"), 1, 1, []),
        (StrategyConfig(name="single"), 1, 2, ["strategy"]),
        (StrategyConfig(name="ddp"), 3, 1, []),
        (StrategyConfig(name="ddp", replicate=4), 2, 2, []),
        (StrategyConfig(name="ddp", replicate=3), 2, 2, ["strategy.replicate"]),
        (StrategyConfig(name="ddp", replicate=3, shard=2), 2, 2, ["strategy.replicate", "strategy.shard"]),
        (StrategyConfig(name="fsdp", shard=4), 4, 1, []),
        (StrategyConfig(name="fsdp", shard=8), 2, 2, ["strategy.shard"]),
        (StrategyConfig(name="fsdp", shard=2, replicate=2), 2, 2, []),
        (StrategyConfig(name="fsdp", replicate=2), 3, 2, []),
        (StrategyConfig(name="fsdp", shard=2), 3, 2, []),
        (StrategyConfig(name="fsdp", shard=2, replicate=2), 3, 2, ["strategy.replicate"]),
        (StrategyConfig(name="fsdp", replicate=4), 3, 2, ["strategy.replicate"]),
    ],
)
def test_layouts(strategy: StrategyConfig, nodes: int, procs: int, keys: list[str]) -> None:
    assert [key for key, _ in check_layout(strategy, nodes, procs)] == keys


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ((3, 2), "fsdp replicate 3 x shard 2 = 6 ranks, but 2 nodes x 2 = 4. Set replicate: 2, or leave it out."),
        ((2, 3), "fsdp replicate 2 x shard 3 = 6 ranks, but 2 nodes x 2 = 4. Set shard: 2, or leave it out."),
        ((3, 3), "fsdp replicate 3 x shard 3 = 9 ranks, but 2 nodes x 2 = 4. Neither divides 4"),
        (
            (3, "auto"),
            "fsdp replicate 3 x shard auto: 3 does not divide 2 nodes x 2 = 4 ranks. Set replicate to one of 1,",
        ),
    ],
)
def test_a_wrong_product_is_told_as_an_equation(degrees: tuple[Any, Any], words: str) -> None:
    strategy = StrategyConfig(name="fsdp", replicate=degrees[0], shard=degrees[1])
    ((_, message),) = check_layout(strategy, 2, 2)
    assert words in message


def test_a_copy_of_the_model_is_cut_over_what_is_left() -> None:
    cases: dict[tuple[Any, Any], tuple[int, int]] = {("auto", "auto"): (1, 6), (2, "auto"): (2, 3), ("auto", 2): (3, 2)}
    for (replicate, shard), wanted in cases.items():
        found = degrees_of(StrategyConfig(name="fsdp", replicate=replicate, shard=shard), 6)
        assert (found.replicate, found.shard) == wanted
    assert degrees_of(StrategyConfig(name="ddp"), 6).data == 6


def test_ranks_stand_on_a_mesh_whose_last_axis_is_the_nearest() -> None:
    degrees = Degrees(pipeline=2, replicate=3, shard=2, tensor=2)
    assert degrees.world_size == 24
    places = [degrees.coordinate(rank) for rank in range(24)]
    assert [degrees.rank_at(place) for place in places] == list(range(24))
    assert places[1] == {"pipeline": 0, "replicate": 0, "shard": 0, "tensor": 1}
    assert degrees.peers(5, ("tensor",)) == (4, 5)
    assert degrees.peers(5, ("shard",)) == (5, 7)
    assert degrees.peers(5, ("pipeline", "replicate")) == (1, 5, 9, 13, 17, 21)
    assert degrees.peers(5, AXES) == tuple(range(24))
    counting = [degrees.data_rank(rank) for rank in range(24) if degrees.data_rank(rank).counts]
    assert [found.rank for found in counting] == list(range(6)), "each part of the samples counts once"
    assert {degrees.data_rank(rank).rank for rank in degrees.peers(5, ("pipeline", "tensor"))} == {2}


@pytest.mark.parametrize(
    ("nodes", "gpus", "cores", "procs", "shape"),
    [
        (1, 0, 8, "auto", (1, 0, 8)),
        (2, 0, 2, "auto", (1, 0, 1)),
        (3, 0, 2, "auto", (1, 0, 1)),
        (1, 8, 64, "auto", (8, 8, 8)),
        (2, 8, 64, "auto", (4, 4, 8)),
        (3, 8, 64, "auto", (2, 2, 10)),
        (2, 1, 16, "auto", (1, 0, 8)),
        (1, 8, 64, 2, (2, 8, 32)),
    ],
)
def test_node_shapes(nodes: int, gpus: int, cores: int, procs: Any, shape: tuple[int, int, int]) -> None:
    cluster = replace(_with().cluster, nodes=nodes, procs_per_node=procs)
    found = shape_nodes(cluster, gpus=gpus, cores=cores)
    assert found == NodeShape(procs_per_node=shape[0], gpus_per_node=shape[1], threads_per_proc=shape[2])


def test_what_a_node_may_use_of_this_machine() -> None:
    def shape(**keys: Any) -> NodeShape:
        return shape_nodes(replace(_with().cluster, nodes=2, **keys), gpus=8, cores=64)

    assert shape(gpus_per_node=1) == NodeShape(procs_per_node=1, gpus_per_node=1, threads_per_proc=32)
    assert shape(gpus_per_node=0) == NodeShape(procs_per_node=1, gpus_per_node=0, threads_per_proc=32)
    assert shape(cpus_per_node=8) == NodeShape(procs_per_node=4, gpus_per_node=4, threads_per_proc=2)


def test_what_this_machine_does_not_have_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"cluster.gpus_per_node: 900 on each of 2 nodes, but this machine has \d+ GPUs"
    ):
        _with("cluster.gpus_per_node=900", "cluster.nodes=2")
    with pytest.raises(ConfigError, match=r"cluster.container: backend local starts no containers"):
        _with("cluster.container={image: a.sif, runtime: apptainer}")


def test_more_workers_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-1)'\necho 'GPU 1: X (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("this machine's own GPUs are counted instead of the two that the test plays")
    assert make_plan(_with(), job_id="j", argv=[], cwd=".").procs_per_node == 2
    with pytest.raises(ConfigError, match=r"cluster.procs_per_node: 3 workers a node, but a GPU takes one"):
        _with("cluster.procs_per_node=3")


def test_plan(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    config = load_config(
        "cfg.yaml", ["cluster.procs_per_node=2", "cluster.cpus_per_proc=3", "recovery.workers=exec"], nodes=2
    )
    plan = make_plan(config, job_id="local-1", argv=["dtrain", "launch"], cwd=str(tmp_path / "sub"))
    assert plan.world_size == 4
    assert plan.threads_per_proc == 3
    assert plan.sys_path == (str(tmp_path), str(tmp_path / "sub"))
    assert plan.checkpoint_url == f"{tmp_path}/out/cfg/checkpoints"
    assert (plan.python, plan.workers, plan.env) == (sys.executable, "exec", {"LEVEL": "3"})
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("every", "interval"),
    [
        (100, Interval(steps=100)),
        ("30s", Interval(seconds=30)),
        ("10min", Interval(seconds=600)),
        ("1.5h", Interval(seconds=5400)),
    ],
)
def test_intervals(every: int | str, interval: Interval) -> None:
    assert parse_interval(every) == interval


@pytest.mark.parametrize("every", [0, -1, "", "10", "10m", "min", "-5s", "0s", "1e3s"])
def test_wrong_intervals(every: int | str) -> None:
    with pytest.raises(ValueError, match="expects"):
        parse_interval(every)


# ---- the command and the reference ----


def test_config_command_prints_yaml_with_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "cfg.yaml", "model.width=9", "model.text='a\n#b'"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == _with("model.width=9", "model.text='a\n#b'").resolved
    lines = {line.split("#")[0].strip(): line.rpartition("# ")[2] for line in printed.splitlines()}
    assert lines["width: 9"] == "command line"
    assert lines["- match: '*.bias'"] == "cfg.yaml:11"
    assert lines["shuffle: true"] == "default"
    assert "\x1b" not in printed


def test_config_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "cfg.yaml", "--json"]) == 0
    config = _with()
    assert json.loads(capsys.readouterr().out) == {"config": config.resolved, "origins": config.origins}


def test_config_command_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "cfg.yaml", "train.stps=1", "strategy=dpp"]) == 2
    said = capsys.readouterr().err
    assert "command line: train.stps: unknown key. Did you mean steps?" in said
    assert "command line: strategy.name: expects one of" in said


def test_the_example_is_a_right_config() -> None:
    assert load_config(REPO / "examples" / "gpt.yaml").name == "bytes-gpt"


def test_reference_is_up_to_date() -> None:
    committed = (REPO / "docs" / "config.md").read_text()
    assert committed == reference.render(), "run: python -m dtrain.launcher.reference > docs/config.md"


def test_composing_imports_no_torch() -> None:
    modules = "dtrain.launcher.compose, dtrain.launcher.plan, dtrain.launcher.targetcheck, dtrain.runtime.targets"
    code = f"import sys, {modules}; dtrain.launcher.compose.load_config('cfg.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
