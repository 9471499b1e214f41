"""Site files, `extends` and the order of the layers: who wins, what is refused, and where each value is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.cluster.errors import ConfigError
from dtrain.launcher import cli
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import make_plan

TEXT = """\
model: m.Net
data: {train: m.Data, batch_size: 8}
optimizer: {_target_: m.opt, lr: 1}
train: {steps: 10}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's site file; the account's is ~/.config/dtrain/site.yaml."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "etc" / "site.yaml"
    path.parent.mkdir()
    path.write_text("run_dir: /scratch/${name}\ncluster: {nodes: 2, env: {A: system, B: system, C: system}}\n")
    monkeypatch.setenv("DTRAIN_SITE", str(path))
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "xdg"
    (home / "dtrain").mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    path = home / "dtrain" / "site.yaml"
    path.write_text('cluster:\n  env: {B: own, C: own}\ncheckpoint: {url: "/keep/${name}"}\n')
    return path


def problems(*words: str) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        load_config("cfg.yaml", words)
    return [(problem.where, problem.key, problem.message) for problem in caught.value.problems]


def test_each_layer_wins_over_those_before_it(tmp_path: Path, site: Path, own: Path) -> None:
    (tmp_path / "base.yaml").write_text("cluster: {env: {C: base, D: base}}\ntrain: {steps: 5, seed: 3}\n")
    (tmp_path / "cfg.yaml").write_text(TEXT + "extends: base.yaml\ncluster: {env: {D: file, E: file}}\n")
    config = load_config("cfg.yaml", ["cluster.env.E=words"])
    assert config.cluster.env == {"A": "system", "B": "own", "C": "base", "D": "file", "E": "words"}
    assert (config.run.train.steps, config.run.train.seed) == (10, 3)
    assert (config.run_dir, config.run.checkpoint.url) == ("/scratch/cfg", "/keep/cfg")
    expected = {
        "cluster.nodes": f"{site}:2", "cluster.env.A": f"{site}:2", "cluster.env.B": f"{own}:2",
        "cluster.env.C": "base.yaml:1", "cluster.env.D": "cfg.yaml:6", "cluster.env.E": "command line",
        "train.seed": "base.yaml:2", "train.steps": "cfg.yaml:4", "run_dir": f"{site}:1", "checkpoint.url": f"{own}:3",
    }  # fmt: skip
    assert {key: config.origins[key] for key in expected} == expected


def test_config_shows_the_layers(tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cfg.yaml").write_text(TEXT)
    assert cli.main(["config", "cfg.yaml"]) == 0
    assert f"# {site}:2" in next(line for line in capsys.readouterr().out.splitlines() if "nodes: 2" in line)
    assert cli.main(["config", "cfg.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"]["run_dir"] == f"{site}:1"


def test_a_machine_without_site_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_SITE")
    monkeypatch.setattr("dtrain.launcher.sources.SYSTEM_SITE", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "cfg.yaml").write_text(TEXT)
    assert load_config("cfg.yaml").run_dir == str(tmp_path / "runs" / "cfg")


def test_a_site_file_of_comments_says_nothing(tmp_path: Path, site: Path) -> None:
    site.write_text("# cluster: {nodes: 2}\n")
    (tmp_path / "cfg.yaml").write_text(TEXT)
    assert load_config("cfg.yaml").cluster.nodes == 1


def test_a_missing_site_file_that_was_named(tmp_path: Path, site: Path) -> None:
    site.unlink()
    (tmp_path / "cfg.yaml").write_text(TEXT)
    ((where, _, message),) = problems()
    assert (where, message[:12]) == (str(site), "no such file")


def test_bases_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    """A chain, a list of which the later one wins, and one base that two others share."""
    folder = tmp_path / "shared"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "root.yaml").write_text("train: {steps: 1, seed: 1}\nname: root\n")
    (folder / "a.yaml").write_text("extends: deep/root.yaml\ntrain: {seed: 2}\n")
    (folder / "b.yaml").write_text("extends: deep/root.yaml\ntrain: {steps: 7}\n")
    text = TEXT.replace("train: {steps: 10}\n", "extends: [shared/a.yaml, shared/b.yaml]\n")
    (tmp_path / "cfg.yaml").write_text(text)
    config = load_config("cfg.yaml")
    assert (config.run.train.steps, config.run.train.seed, config.name) == (7, 1, "root")
    assert config.origins["train.steps"] == "shared/b.yaml:2"
    assert config.folders == (str(tmp_path), str(folder), str(folder / "deep"))
    assert make_plan(config, job_id="x", argv=(), cwd="/").sys_path == (
        str(tmp_path), "/", str(folder), str(folder / "deep"),
    )  # fmt: skip
    (tmp_path / "cfg.yaml").write_text(text.replace("shared/a.yaml, ", f"{folder}/a.yaml, "))
    assert load_config("cfg.yaml").run.train.steps == 7


def test_short_forms_merge_over_layers(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("strategy: fsdp\nschedule: {name: cosine, warmup: 3}\n")
    (tmp_path / "cfg.yaml").write_text(TEXT + "extends: base.yaml\nstrategy: {shard: 1}\nschedule: linear\n")
    config = load_config("cfg.yaml")
    assert (config.strategy.name, config.strategy.shard) == ("fsdp", 1)
    assert config.resolved["schedule"]["name"] == "linear"
    assert config.resolved["schedule"]["warmup"] == 0


def test_what_a_site_may_not_say(tmp_path: Path, site: Path) -> None:
    site.write_text("train: {steps: 3}\ncluster: {nodes: two}\ncheckpoint:\n  every: 5\n  url: /x\nextends: a.yaml\n")
    (tmp_path / "cfg.yaml").write_text(TEXT + "strategy: none\n")
    found = problems()
    words = "a site file sets only cluster, run_dir, checkpoint.url and track"
    assert [(where, key) for where, key, message in found if message.startswith(words)] == [
        (f"{site}:1", "train"), (f"{site}:4", "checkpoint.every"), (f"{site}:6", "extends")
    ]  # fmt: skip
    assert [(where, key) for where, key, message in found if not message.startswith(words)] == [
        (f"{site}:2", "cluster.nodes"), ("cfg.yaml:5", "strategy.name")
    ]  # fmt: skip


def test_what_is_missing_is_missing_in_the_config(tmp_path: Path, site: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(TEXT.replace("model: m.Net\n", ""))
    assert [found[:2] for found in problems()] == [("cfg.yaml", "model")]


def test_a_base_that_is_broken_is_the_only_problem(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {steps: 1\nmodel: x\n")
    (tmp_path / "cfg.yaml").write_text("extends: base.yaml\n")
    ((where, _, message),) = problems()
    assert where == "base.yaml:2"
    assert "not valid YAML" in message


def test_problems_of_a_base_come_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train:\n  steps: 1\n  sed: 1\n")
    (tmp_path / "cfg.yaml").write_text(TEXT + "extends: base.yaml\nnam: x\n")
    assert [found[:2] for found in problems()] == [("base.yaml:3", "train.sed"), ("cfg.yaml:6", "nam")]
