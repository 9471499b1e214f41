"""`script:` in a config: what it means, what does not go with it, and what a launch on an existing run does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.cluster.errors import ConfigError
from dtrain.launcher.compose import diff_identity, load_config
from dtrain.launcher.identity import Existing, decide
from dtrain.launcher.plan import make_plan
from dtrain.launcher.scriptcheck import check_script_runs
from dtrain.runtime.scriptconfig import Script, parse_script, read_script_config

MODEL = "model: m.Net\ndata: {train: m.Data, batch_size: 8}\noptimizer: torch.optim.SGD\ntrain: {steps: 3}\n"


def problems(tmp_path: Path, text: str, *words: str) -> str:
    (tmp_path / "cfg.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("cfg.yaml", words)
    return str(caught.value)


def test_words_as_a_shell_divides_them() -> None:
    assert parse_script("train.py --name 'a b' --lr=0.1") == Script(
        path="train.py", module="", args=("--name", "a b", "--lr=0.1")
    )
    assert parse_script("-m pkg.train --x") == Script(path="", module="pkg.train", args=("--x",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.py 'a", "No closing quotation"),
        ("", "expects a script and its arguments"),
        ("--lr 1 train.py", "expects a script and its arguments"),
        ("-m", "-m expects the name of a module"),
        ("-m a/b.py", "-m expects the name of a module"),
        ("python train.py", "dtrain starts a process a rank itself"),
        ("torchrun --nproc-per-node 2 train.py", "dtrain starts a process a rank itself"),
    ],
)
def test_scripts_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    message = problems(tmp_path, f'name: x\nscript: "{text}"\n')
    assert "cfg.yaml:2: script: " in message
    assert said in message


def test_what_does_not_go_with_a_script_is_named_with_its_line(tmp_path: Path) -> None:
    text = f"script: train.py\n{MODEL}checkpoint:\n  every: 10\nstrategy: fsdp\ncluster: {{nodes: 1, nodse: 2}}\n"
    message = problems(tmp_path, text, "schedule=cosine")
    for place in ("2: model", "3: data", "4: optimizer", "5: train", "7: checkpoint.every", "8: strategy"):
        assert f"cfg.yaml:{place}: does not go with script" in message
    assert "command line: schedule: does not go with script" in message
    assert "cfg.yaml:9: cluster.nodse: unknown key. Did you mean nodes?" in message
    assert message.count("\n") == 7  # and nothing is said twice


def test_cluster_is_checked_as_ever(tmp_path: Path) -> None:
    message = problems(
        tmp_path, "script: train.py\ncluster: {env: {MASTER_PORT: 1, TORCHELASTIC_USE_AGENT_STORE: 1}}\n"
    )
    assert "cluster.env.MASTER_PORT: is set by dtrain" in message
    assert "cluster.env.TORCHELASTIC_USE_AGENT_STORE: is set by dtrain" in message


def test_a_plan_for_a_script_starts_plain_processes_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text("script: train.py --x 1\nrecovery: {max_restarts_without_progress: 7}\n")
    for word, workers in (("recovery.workers=auto", "exec"), ("recovery.workers=warm", "warm")):
        plan = make_plan(load_config("cfg.yaml", [word]), job_id="j", argv=(), cwd=".")
        assert (plan.kind, plan.workers, plan.max_restarts_without_progress) == ("script", workers, 7)
    (tmp_path / "cfg.yaml").write_text(MODEL)
    plan = make_plan(load_config("cfg.yaml"), job_id="j", argv=(), cwd=".")
    assert (plan.kind, plan.workers) == ("model", "warm")


def test_what_the_workers_read(tmp_path: Path) -> None:
    from dtrain.launcher.compose import dump_resolved

    (tmp_path / "cfg.yaml").write_text("script: train.py --x 1\ncluster: {nodes: 2}\n")
    config = load_config("cfg.yaml")
    (tmp_path / "resolved.yaml").write_text(dump_resolved(config))
    assert read_script_config(tmp_path / "resolved.yaml") == config.content
    assert config.steps is None
    with pytest.raises(TypeError, match="runs a script"):
        _ = config.run


# ---- is it there ----


def check(tmp_path: Path, text: str) -> str:
    beside, work = tmp_path / "beside", tmp_path / "work"
    found = check_script_runs(text, {"script": "cfg.yaml:1"}, sys.executable, [str(beside), str(work)], {})
    return "".join(map(str, found))


def test_a_script_is_looked_for_beside_the_config_then_in_the_working_directory(tmp_path: Path) -> None:
    beside, work = tmp_path / "beside", tmp_path / "work"
    (beside / "pkg").mkdir(parents=True)
    work.mkdir()
    assert f"cfg.yaml:1: script: there is no script train.py. Looked in {beside} and {work}." in check(
        tmp_path, "train.py"
    )
    (work / "train.py").write_text("raise SystemExit('not to be run')\n")
    assert check(tmp_path, "train.py --x") == ""
    (beside / "train.py").write_text("print(\n")
    assert "beside/train.py:1: SyntaxError" in check(tmp_path, "train.py")
    assert "is a folder. Name the script in it, or a module" in check(tmp_path, "pkg")


def test_a_module_is_looked_for_with_its_packages(tmp_path: Path) -> None:
    package = tmp_path / "work" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("print('noise')\n")
    assert "there is no module pkg.train" in check(tmp_path, "-m pkg.train")
    assert "there is no module pkg.__main__" in check(tmp_path, "-m pkg")
    (package / "train.py").write_text("raise SystemExit('not to be run')\n")
    assert check(tmp_path, "-m pkg.train") == ""
    (package / "__init__.py").write_text("import nothing_of_this_name\n")
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in check(tmp_path, "-m pkg.train")


# ---- a launch on a directory that has a run ----


def existing(state: str, *identity: str) -> Existing:
    return Existing(job_id="j", state=state, step=0, identity_lines=identity, other_lines=("cluster.nodes: 1 -> 2",))


@pytest.mark.parametrize(
    ("there", "changed", "action"),
    [
        (existing("done"), False, "done"),
        (existing("stopped"), False, "continue"),
        (existing("failed"), False, "continue"),
        (existing("running"), False, "refuse"),
        (existing("done", "script: a -> b"), False, "refuse"),
        (existing("done", "script: a -> b"), True, "continue"),
    ],
)
def test_relaunching_a_script(there: Existing, changed: bool, action: str) -> None:
    """Whether there is anything left to do only the script knows: a checkpoint says nothing."""
    for checkpoint in (None, 100):
        found = decide(there, steps_asked=None, checkpoint_step=checkpoint, continue_changed=changed)
        assert found.action == action


def test_path_and_arguments_are_what_makes_it_the_same_run() -> None:
    old = {"script": "train.py --lr 0.1", "cluster": {"nodes": 1}}
    identity, rest = diff_identity(old, {"script": "train.py --lr 0.2", "cluster": {"nodes": 2}})
    assert identity == ["script: train.py --lr 0.1 -> train.py --lr 0.2"]
    assert rest == ["cluster.nodes: 1 -> 2"]
