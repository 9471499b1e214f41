"""Wrong configs: each is refused with file:line, the key and a way out, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dtrain.cluster.errors import ConfigError, Problem
from dtrain.launcher import cli
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import nodes_python
from dtrain.launcher.targetcheck import check_targets

# The lines of a config that is right; a case replaces some and adds others. Line n of a case is line n of the file.
LINES = {
    "model": "model: {_target_: mine.Net, width: 8}",
    "data": "data: {train: mine.Squares, batch_size: 8}",
    "optimizer": "optimizer: {_target_: mine.SGD, lr: 1e-2}",
    "train": "train: {steps: 10}",
}
MODULES = {
    "mine.py": """
print("imported, and chatty")
class Net:
    def __init__(self, width, depth=2): ...
class Squares: ...
class SGD:
    def __init__(self, params, lr, momentum=0.0): ...
def loss(output, batch, smoothing=0.0): ...
def one(batch): ...
table = {}
""",
    "broken.py": "x = 1\nraise RuntimeError('no license for this')\n",
    "unfinished.py": "def f(:\n    pass\n",
    "needy.py": "import a_package_that_nobody_has\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "loop.yaml": "extends: cfg.yaml\n",
    "dies.py": "import os, sys\nprint('farewell', file=sys.stderr, flush=True)\nos._exit(7)\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`expect`: (where, key, words of the message); "cfg.yaml:4" is written 4."""

    id: str
    lines: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    text: str | None = None
    overrides: tuple[str, ...] = ()
    expect: tuple[tuple[int | str, str, str], ...]


def _one(
    id: str, where: int | str, key: str, words: str, *more: str, overrides: tuple[str, ...] = (), **lines: str
) -> Case:
    return Case(id=id, lines=lines, more=more, overrides=overrides, expect=((where, key, words),))


def _text(id: str, text: str, where: int | str, key: str, words: str) -> Case:
    return Case(id=id, text=text, expect=((where, key, words),))


CASES = [
    # keys
    _one("unknown top-level key", 5, "optimiser", "unknown key. Did you mean optimizer?", "optimiser: mine.SGD"),
    _one("unknown nested key", 2, "data.batchsize",
         "unknown key. Did you mean batch_size? Valid here: train, batch_size",
         data="data: {train: mine.Squares, batch_size: 8, batchsize: 9}"),
    _one("missing section", "cfg.yaml", "train", "is required and missing", train=""),
    _one("missing key", 4, "train.steps", "is required and missing (optimizer steps", train="train: {seed: 1}"),
    _one("key given twice", 5, "train", "is given twice, first at cfg.yaml:4", "train: {steps: 20}"),
    _one("a number as a key", 5, "", "keys are text, found '3'", "3: 4"),
    # types
    _one("text for a number", 4, "train.steps", 'expects a whole number of at least 1, found the text "many"',
         train="train: {steps: many}"),
    _one("quoted number", 4, "train.steps", "Write it without quotes", train='train: {steps: "10"}'),
    _one("float for an integer", 4, "train.steps", "found the number 1e3. Write 1000.", train="train: {steps: 1e3}"),
    _one("bool for an integer", 4, "train.seed", "expects a whole number of at least 0, found true",
         train="train: {steps: 10, seed: true}"),
    _one("number for a bool", 2, "data.shuffle", "expects true or false, found the number 1",
         data="data: {train: mine.Squares, batch_size: 8, shuffle: 1}"),
    _one("yes for a bool", 2, "data.shuffle", 'Write true, false or "yes"',
         data="data: {train: mine.Squares, batch_size: 8, shuffle: yes}"),
    _one("null for a required number", 4, "train.steps", "found nothing (null)", train="train: {steps: }"),
    _one("a list for a section", 4, "train", "expects a mapping, found a list", train="train: [10]"),
    _one("text for a list", 5, "strategy.wrap",
         "expects a list, found the text \"blocks.*\". Put it in square brackets",
         "strategy: {name: fsdp, wrap: blocks.*}"),
    _one("a mapping for a number", 5, "cluster.nodes", "expects a whole number of at least 1, found a mapping",
         "cluster: {nodes: {min: 1}}"),
    _one("negative number", 4, "train.steps", "at least 1, found the number -5", train="train: {steps: -5}"),
    _one("out of range", 5, "schedule.min_ratio", "expects a number between 0 and 1, found the number 1.5",
         "schedule: {name: cosine, min_ratio: 1.5}"),
    _one("not a number", 4, "train.clip_grad_norm", "found the number .nan",
         train="train: {steps: 9, clip_grad_norm: .nan}"),
    _one("bad choice", 4, "train.precision", 'one of "fp32", "bf16", "fp16", found the text "bf61". Did you mean bf16?',
         train="train: {steps: 10, precision: bf61}"),
    _one("bad choice in short form", 5, "strategy.name", 'found the text "fsdb". Did you mean fsdp?', "strategy: fsdb"),
    _one("bad choice beside numbers", 5, "cluster.procs_per_node",
         'or "auto", found the text "atuo". Did you mean auto?',
         "cluster: {procs_per_node: atuo}"),
    _one("zero beside auto", 5, "cluster.procs_per_node", "expects a whole number of at least 1, found the number 0",
         "cluster: {procs_per_node: 0}"),
    _one("bad duration", 5, "checkpoint.every", 'expects steps (100) or a time (30s, 10min, 2h), found "10 minutes"',
         "checkpoint: {every: 10 minutes}"),
    _one("no duration", 5, "checkpoint.every", "expects at least 1 step, found 0", "checkpoint: {every: 0}"),
    _one("bad name", 5, "name", "For example: name: x-rm-rf", 'name: "x; rm -rf ~"'),
    # notation
    _text("missing file", "", "no.yaml", "", "no such file"),
    _text("empty file", "# nothing yet\n", 1, "", "the file is empty"),
    _text("a list at top level", "- model: x\n", 1, "",
         "expects a mapping at the top level (`key: value` lines), found a list"),
    _text("bad syntax", "model: x\ndata: {a: 1\ntrain: 2\n", 3, "", "not valid YAML"),
    _text("a tab", "model:\n\t_target_: mine.Net\n", 2, "", "a tab. YAML is indented with spaces."),
    _one("an endless alias", 1, "model.a", "the alias (*) contains itself",
         model="model: &m {_target_: mine.Net, a: *m}"),
    _one("a tag", 1, "model", "os.system is not supported", model="model: !!python/object/apply:os.system [ls]"),
    _text("not text", "name: \udc80", "cfg.yaml", "", "not UTF-8 text (byte 6)"),
    # references
    _one("bad reference", 5, "name", "${train.step} refers to a key that does not exist. Did you mean ${train.steps}?",
         "name: n-${train.step}"),
    _one("circular references", 5, "name", "the references go in a circle: name -> run_dir -> name",
         "name: a${run_dir}", "run_dir: b${name}"),
    _one("unset variable", 5, "name", "the environment variable NO_SUCH_VARIABLE is not set",
         "name: ${env:NO_SUCH_VARIABLE}"),
    _one("open reference", 5, "name", "${ has no closing }", 'name: "${train.steps"'),
    _one("a section inside a text", 5, "name", "is a mapping, which cannot stand inside a text", 'name: "x-${data}"'),
    # the command line
    _one("override without a value", "command line", "", "expects key.path=value, found 'train.steps'",
         overrides=("train.steps",)),
    _one("override without a key", "command line", "", "expects key.path=value, found '=4'", overrides=("=4",)),
    _one("override of an unknown key", "command line", "train.stesp", "Did you mean steps?",
         overrides=("train.stesp=4",)),
    _one("a key without its section", "command line", "nodes", "unknown key. Did you mean cluster.nodes? Valid here: ",
         overrides=("nodes=4",)),
    _one("a key two sections down", 5, "partition", "Did you mean cluster.slurm.partition?", "partition: gpu"),
    _one("a URL with one slash", 5, "checkpoint.url", "s3:/bucket would be a folder. Did you mean s3://...?",
         "checkpoint: {url: s3:/bucket}"),
    _one("override that is no YAML", "command line", "name", "Put quotes around it: name='\"*x\"'",
         overrides=("name=*x",)),
    _one("override of no item", "command line", "optimizer.groups.1",
         "there is no item 1: the list at cfg.yaml:3 has 1",
         overrides=("optimizer.groups.1.lr=1",),
         optimizer='optimizer: {_target_: mine.SGD, lr: 1, groups: [{match: "*", lr: 2}]}'),
    # layers
    _one("extends in a circle", "loop.yaml:1", "extends",
         "extend each other in a circle: cfg.yaml -> loop.yaml -> cfg.yaml. Take one of them", "extends: loop.yaml"),
    _one("extends a missing file", 5, "extends", "bases/b.yaml: no such file. The path starts at the folder",
         "extends: bases/b.yaml"),
    _one("extends a number", 5, "extends", "expects the path of a config file, or a list of them, found the number 3",
         "extends: 3"),
    _one("extends a reference", 5, "extends", "Write it out", "extends: ${name}.yaml"),
    _one("extends on the command line", "command line", "extends", "belongs into a config file",
         overrides=("extends=mine.yaml",)),
    # sections that do not fit together
    _one("layout of fsdp", 5, "strategy.shard",
         "fsdp replicate auto x shard 3: 3 does not divide 2 nodes x 2 = 4 ranks. Set shard to one of 1, 2, 4",
         "strategy: {name: fsdp, shard: 3}", "cluster: {nodes: 2, procs_per_node: 2}"),
    _one("layout of single", 5, "strategy", "single = 1 rank, but 2 nodes x 1 = 2", "strategy: single",
         "cluster: {nodes: 2}"),
    _one("shard with ddp", "command line", "strategy.shard", "shard 2 does not go with ddp", "strategy: ddp",
         overrides=("strategy.shard=2",)),
    _one("micro_batch above batch_size", 4, "train.micro_batch", "16 samples are more than data.batch_size 8",
         train="train: {steps: 10, micro_batch: 16}"),
    _one("evaluation of nothing", 4, "train.eval_every", "set data.eval", train="train: {steps: 10, eval_every: 5}"),
    _one("metrics over nothing", 5, "metrics", "means over data.eval, which is not set", "metrics: mine.loss"),
    _one("early stop without evaluations", 4, "train.early_stop", "data.eval is not set",
         train="train: {steps: 10, early_stop: loss}"),
    _one("early stop without eval_every", 4, "train.early_stop", "train.eval_every is not set",
         data="data: {train: mine.Squares, batch_size: 8, eval: mine.Squares}",
         train="train: {steps: 10, early_stop: {metric: loss, patience: 2}}"),
    _one("early stop on nothing", 4, "train.early_stop.metric", "no metric accuracy: set metrics, or take loss",
         data="data: {train: mine.Squares, batch_size: 8, eval: mine.Squares}",
         train="train: {steps: 10, eval_every: 5, early_stop: accuracy}"),
    _one("early stop without patience", 4, "train.early_stop.patience", "at least 1, found the number 0",
         train="train: {steps: 10, early_stop: {patience: 0}}"),
    _one("early stop of no mode", 4, "train.early_stop.mode", 'one of "min", "max", found the text "maximum"',
         train="train: {steps: 10, early_stop: {mode: maximum}}"),
    _one("best of no evaluation", 5, "checkpoint.best", "data.eval is not set", "checkpoint: {best: loss}"),
    _one("best of an unknown metric", 5, "checkpoint.best.metric", "no metric f1: set metrics, or take loss",
         "checkpoint: {best: {metric: f1, mode: max}}", train="train: {steps: 10, eval_every: 5}",
         data="data: {train: mine.Squares, batch_size: 8, eval: mine.Squares}"),
    _one("best of none", 5, "checkpoint.best.keep", "at least 1, found the number 0", "checkpoint: {best: {keep: 0}}"),
    _one("closure beside a loss", 5, "loss_closure", "so loss is never asked",
         "loss_closure: mine.loss", "loss: mine.loss"),
    _one("closure beside a forward", 5, "loss_closure", "so data.forward is never asked", "loss_closure: mine.loss",
         data="data: {train: mine.Squares, batch_size: 8, forward: mine.loss}"),
    _one("closure beside metrics", 6, "metrics", "needs the model's output, which loss_closure keeps to itself",
         "loss_closure: mine.loss", "metrics: mine.loss",
         data="data: {train: mine.Squares, batch_size: 8, eval: mine.Squares}"),
    _one("closure of one argument", 5, "loss_closure._target_", "called with 2 positional arguments, but takes 1",
         "loss_closure: mine.one"),
    _one("forward that is missing", 2, "data.forward._target_", "the module mine has no forwrd",
         data="data: {train: mine.Squares, batch_size: 8, forward: mine.forwrd}"),
    _one("warm-up beyond the end", 5, "schedule.warmup", "20 steps are more than train.steps 10",
         "schedule: {warmup: 20}"),
    _one("schedules without steps", 5, "schedule.0.steps", "is required of all but the last",
         "schedule: [linear, cosine]"),
    _one("schedules that are too long", 5, "schedule.1", "never begins: those before it last 10 steps",
         "schedule: [{name: linear, steps: 10}, cosine]"),
    _one("steps of the last schedule", 5, "schedule.1.steps", "the last one lasts for the 6 steps that are left",
         "schedule: [{name: linear, steps: 4}, {name: cosine, steps: 6}]"),
    _one("steps of the only schedule", 5, "schedule.steps", "belongs to a list of schedules", "schedule: {steps: 4}"),
    _one("no schedule in the list", 5, "schedule", "is an empty list", "schedule: []"),
    _one("warm-up beyond its schedule", 5, "schedule.0.warmup", "5 steps are more than its steps 4",
         "schedule: [{name: linear, steps: 4, warmup: 5}, cosine]"),
    _one("warm-up beyond the last schedule", 5, "schedule.1.warmup", "the steps that are left for it, 6",
         "schedule: [{name: linear, steps: 4}, {name: cosine, warmup: 7}]"),
    _one("unknown schedule in a list", 5, "schedule.1.name", 'found the text "cosin". Did you mean cosine?',
         "schedule: [{name: linear, steps: 4}, cosin]"),
    _one("unknown schedule of a group", 3, "optimizer.groups.0.schedule.name", "Did you mean linear?",
         optimizer='optimizer: {_target_: mine.SGD, lr: 1, groups: [{match: "*", schedule: {name: linaer}}]}'),
    _one("warm-up of a group beyond the end", 3, "optimizer.groups.0.schedule.warmup", "20 steps are more than",
         optimizer='optimizer: {_target_: mine.SGD, lr: 1, groups: [{match: "*", schedule: {warmup: 20}}]}'),
    _one("a group's schedule beside one's own", 3, "optimizer.groups.0.schedule",
         "mine.one sets the rates of all groups", "schedule: mine.one",
         optimizer='optimizer: {_target_: mine.SGD, lr: 1, groups: [{match: "*", schedule: cosine}]}'),
    _one("wsd without decay", 5, "schedule.decay", "For example: decay: 2", "schedule: wsd"),
    _one("unknown store", 5, "checkpoint.url", "no store for gopher://", "checkpoint: {url: gopher://host/x}"),
    _one("run_dir is a file", 5, "run_dir", "is a file", "run_dir: mine.py"),
    _one("run_dir below a file", 5, "run_dir", "mine.py is a file, and a directory is needed", "run_dir: mine.py/run"),
    _one("a rank in env", 5, "cluster.env.RANK", "is set by dtrain", "cluster: {env: {RANK: 3}}"),
    # nodes
    _one("no such interface", 5, "cluster.interface", "there is no interface eht0. There are: lo (127.0.0.1)",
         "cluster: {interface: eht0}"),
    _one("no address in the range", 5, "cluster.interface", "no interface has an address in 203.0.113.0/24",
         "cluster: {interface: 203.0.113.0/24}"),
    _one("no range of addresses", 5, "cluster.interface", "10.0.0.0/99 is no range of addresses",
         "cluster: {interface: 10.0.0.0/99}"),
    _one("one port", 5, "cluster.port_range", "expects the first and the last port, like [29400, 29499], found 1",
         "cluster: {port_range: [29400]}"),
    _one("ports the wrong way round", 5, "cluster.port_range", "is the wrong way round",
         "cluster: {port_range: [29500, 29400]}"),
    _one("ports beyond the last", 5, "cluster.port_range", "ports are between 1 and 65535",
         "cluster: {port_range: [65000, 70000]}"),
    _one("a port for a range", 5, "cluster.port_range", "expects a list, found the number 29400",
         "cluster: {port_range: 29400}"),
    _one("a secret that is not set", 5, "cluster.secrets.0", "NO_SUCH_SECRET is not set here",
         "cluster: {secrets: [NO_SUCH_SECRET]}"),
    _one("a secret's value", 5, "cluster.secrets.0", "expects the name of an environment variable, not its value",
         "cluster: {secrets: [hf_abc-def]}"),
    _one("a setup line that bash can't read", 5, "cluster.setup.1", "bash can't read this line: ",
         "cluster: {setup: [module load cuda, 'if true']}"),
    _one("a setup line that fails", 5, "cluster.setup.1", "setup line 2, `false`, ended with 1",
         "cluster: {setup: ['true', 'false']}"),
    _one("a missing Python", 5, "cluster.python", "/no/such/python cannot be started: No such file or directory",
         "cluster: {python: /no/such/python}"),
    _one("no Python", 5, "cluster.python", "is empty", "cluster: {python: ''}"),
    # targets
    _one("no dotted name", 1, "model._target_", 'expects a dotted name like package.module.name, found the text "Net"',
         model="model: {_target_: Net}"),
    _one("no target", 1, "model._target_", "is required and missing", model="model: {width: 8}"),
    _one("nested target", 1, "model.encoder._target_", "nested targets are not built",
         model="model: {_target_: mine.Net, width: 8, encoder: {_target_: mine.Net}}"),
    _one("group without a pattern", 3, "optimizer.groups.0.match", "expects a pattern over parameter names",
         optimizer="optimizer: {_target_: mine.SGD, lr: 1, groups: [{lr: 2}]}"),
    _one("missing module", 1, "model._target_", "there is no module minne. Did you mean mine?",
         model="model: {_target_: minne.Net}"),
    _one("missing name", 1, "model._target_", "the module mine has no Nett. Did you mean mine.Net?",
         model="model: {_target_: mine.Nett}"),
    _one("module that raises", 1, "model._target_", "importing broken raised RuntimeError: no license for this",
         model="model: broken.Net"),
    _one("where a module raises", 1, "model._target_", "broken.py:2)", model="model: broken.Net"),
    _one("module with a syntax error", 1, "model._target_", "unfinished.py:1)", model="model: unfinished.f"),
    _one("module that needs another", 1, "model._target_", "No module named 'a_package_that_nobody_has'",
         model="model: needy.f"),
    _one("script without a guard", 1, "model._target_", "importing exits raised SystemExit", model="model: exits.f"),
    _one("module that ends its process", 1, "model._target_",
         'ended its process with exit code 7. It said last: "farewell"',
         model="model: dies.f"),
    _one("not callable", 1, "model._target_", "mine.table is a value of type dict, which cannot be called",
         model="model: mine.table"),
    _one("wrong keyword", 1, "model._target_", "mine.Net(width, depth): it has no parameter widht, did you mean width?",
         model="model: {_target_: mine.Net, width: 8, widht: 8}"),
    _one("missing argument", 1, "model._target_", "its argument width is required and missing",
         model="model: mine.Net"),
    _one("keyword that dtrain passes", 3, "optimizer._target_", "params is passed by dtrain itself",
         optimizer="optimizer: {_target_: mine.SGD, lr: 1, params: 2}"),
    _one("wrong setting in a group", 3, "optimizer._target_", "unknown setting momentun, did you mean momentum?",
         optimizer='optimizer: {_target_: mine.SGD, lr: 1, groups: [{match: "*", momentun: 2}]}'),
    _one("wrong keyword of a function", 5, "loss._target_", "it has no parameter smothing, did you mean smoothing?",
         "loss: {_target_: mine.loss, smothing: 0.1}"),
    # all at once
    Case(
        id="everything at once",
        lines={"model": "model: {width: 8}", "train": "train: {steps: 0, sed: 1}"},
        more=("strategy: {name: dpp}", "name: ${nothing}"),
        overrides=("cluster.nodes=none",),
        expect=(
            (1, "model._target_", "missing"),
            (4, "train.sed", "Did you mean seed?"),
            (4, "train.steps", "at least 1"),
            (5, "strategy.name", "Did you mean ddp?"),
            (6, "name", "does not exist"),
            ("command line", "cluster.nodes", "expects a whole number"),
        ),
    ),
    Case(
        id="every target at once",
        lines={"model": "model: dies.f", "data": "data: {train: mine.Sqares, batch_size: 8}"},
        more=("loss: {_target_: mine.loss, x: 1}",),
        expect=(
            (1, "model._target_", "exit code 7"),
            (2, "data.train._target_", "Did you mean mine.Squares?"),
            (5, "loss._target_", "it has no parameter x"),
        ),
    ),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def _write(case: Case, folder: Path) -> str:
    if case.id == "missing file":
        return "no.yaml"
    text = case.text
    if text is None:
        text = "\n".join([*{**LINES, **case.lines}.values(), *case.more]) + "\n"
    (folder / "cfg.yaml").write_bytes(text.encode(errors="surrogateescape"))
    return "cfg.yaml"


def find_problems(path: str, overrides: tuple[str, ...], folder: Path) -> list[Problem]:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return list(error.problems)
    return check_targets(config, nodes_python(config.cluster), [str(folder)], timeout_s=60)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_wrong_config(case: Case, folder: Path) -> None:
    problems = find_problems(_write(case, folder), case.overrides, folder)
    assert len(problems) == len(case.expect), "\n".join(map(str, problems))
    for problem, (where, key, words) in zip(problems, case.expect, strict=True):
        assert problem.where == (f"cfg.yaml:{where}" if isinstance(where, int) else where)
        assert problem.key == key
        assert words in problem.message
        assert not problem.message.startswith(("strategy:", f"{problem.key}:")), "its key is there already"
    assert not (folder / "runs").exists()


def test_right_config_has_no_problem(folder: Path) -> None:
    assert find_problems(_write(Case(id="right", expect=()), folder), (), folder) == []


def test_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layout of fsdp", "wrong keyword", "bad syntax"])
def test_launch_refuses_with_exit_2(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in CASES if case.id == name)
    assert cli.main(["launch", _write(case, folder), *case.overrides]) == 2
    where, key, words = case.expect[0]
    said = capsys.readouterr().err
    assert f"cfg.yaml:{where}: " in said
    assert f"{key}: " in said
    assert words in said
    assert not (folder / "runs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk to fill: run as root")
def test_a_full_disk_is_found_before_anything_starts(folder: Path) -> None:
    """A real one, in a mount namespace of its own, which goes with the command."""
    disk = folder / "disk"
    disk.mkdir()
    (folder / "cfg.yaml").write_text("\n".join([*LINES.values(), f"checkpoint: {{url: {disk}/checkpoints}}"]))
    script = """
        mount -t tmpfs -o size=256k none "$1" && head -c 1M /dev/zero > "$1/fill" 2>/dev/null
        shift; exec "$@"
    """
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(disk), sys.executable, "-m", "dtrain.launcher.cli"]
    done = subprocess.run([*command, "launch", "cfg.yaml"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"cfg.yaml:5: checkpoint.url: the disk of {disk} is full (0 KiB left)" in done.stderr
    assert not (folder / "runs").exists()
