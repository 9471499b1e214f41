"""`dtrain verify`: every planted mistake is found and its cause named; clean runs raise no alarm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import PARITY, Run, failure, needs, prepare, rank_runner

from dtrain.cluster import exits
from dtrain.launcher.commands.verify import lines
from dtrain.launcher.compose import load_config
from dtrain.launcher.plan import make_plan
from dtrain.launcher.verifying import Answer, Asked
from dtrain.runtime.config import read_run_config
from dtrain.runtime.verify.judge import judge
from dtrain.runtime.verify.numbers import mixture, multiple
from dtrain.runtime.verify.records import RECORDS, Orders
from dtrain.runtime.verify.sample import LIMIT, chosen, inside
from dtrain.runtime.verify.verdict import Cause, Finding, Largest, Verdict
from dtrain.strategies.boxes import Box, grid_boxes

ENTRY = "dtrain.runtime.verify.worker.main"
PIPELINE = "{name: ddp, pipeline: 2}"
CLIP = "train.clip_grad_norm=0.05"  # planted.CLIP

Verify = Callable[..., Verdict]


@pytest.fixture(scope="module")
def run() -> Run:
    there = ["deepspeed"] if find_spec("deepspeed") else []
    return rank_runner({"DS_ACCELERATOR": "cpu"}, preload=["planted", *there])


@pytest.fixture(scope="module")
def verify(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Verify:
    """verify(strategy, world_size, *overrides, plant=...). The ranks' run without a plant, and one process's on the
    micro-batches that it had, are made once for all that ask for the same."""
    cleans: dict[tuple[Any, ...], Path] = {}
    ones: dict[tuple[Any, ...], Path] = {}

    def ranks(strategy: str, world_size: int, overrides: tuple[str, ...], steps: int, plant: str | None) -> Path:
        procs = f"cluster.procs_per_node={world_size}"
        folder = prepare(tmp_path_factory.mktemp("ranks") / "run", f"strategy={strategy}", procs, *overrides)
        Orders(steps=steps, strategies=None).write(folder)
        more = {"before": f"planted.{plant}"} if plant else {}
        assert run(folder, world_size, entry=ENTRY, **more) == [0] * world_size
        return folder

    def verify_case(
        strategy: str, world_size: int, *overrides: str, plant: str | None = None, steps: int = 2
    ) -> Verdict:
        if "zero" in strategy:
            needs("deepspeed", "needs DeepSpeed: see docs/zero.md")
        asked = (strategy, world_size, overrides, steps)
        key = (world_size // (2 if "pipeline" in strategy else 1), overrides, steps)
        if key not in ones or (not plant and asked not in cleans):
            cleans[asked] = ranks(*asked, None)
        if key not in ones:
            one = prepare(tmp_path_factory.mktemp("one") / "run", "strategy=single", *overrides)
            Orders(steps=steps, strategies=(str(cleans[asked] / RECORDS),)).write(one)
            assert run(one, 1, entry=ENTRY) == [0]
            ones[key] = one
        folder = ranks(*asked, plant) if plant else cleans[asked]
        return judge(folder, ones[key], 0, read_run_config(ones[key] / "config.yaml")[0].train)

    return verify_case


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "plant", "cause", "where"),
    [
        ("ddp", "own_count", Cause.LOSS, "gradient"),
        ("ddp", "mean_of_means", Cause.LOSS, "gradient"),
        ("fsdp", "reported_mean_of_ranks", Cause.LOSS, "loss"),
        ("ddp", "averaged", Cause.SCALE, "gradient"),
        ("fsdp", "averaged_shards", Cause.SCALE, "gradient"),
        ("ddp", "accumulated_twice", Cause.SCALE, "gradient"),
        ("ddp", "forgotten_bucket", Cause.SUM, "gradient"),
        ("ddp", "one_copy", Cause.SUM, "gradient"),
        ("fsdp", "own_norm", Cause.NORM, "gradient norm"),
        ("fsdp", "own_clipping", Cause.NORM, "optimizer state"),
        ("ddp", "norm_of_a_group", Cause.NORM, "gradient norm"),
        ("ddp", "half_weights", Cause.DTYPE, "weights"),
        ("fsdp", "rounded_weights", Cause.DTYPE, "weights"),
        ("ddp", "own_buffer", Cause.BUFFER, "buffer"),
        ("ddp", "own_seed", Cause.ORDER, "samples"),
        ("fsdp", "everybodys_samples", Cause.ORDER, "samples"),
        ("ddp", "other_start", Cause.START, "weights"),
        ("ddp", "other_attention", Cause.FORWARD, "loss"),
        ("fsdp", "weight_decay", Cause.UPDATE, "weights"),
        (PIPELINE, "mean_of_means", Cause.LOSS, "gradient"),
        (PIPELINE, "averaged_stages", Cause.SCALE, "gradient"),
        (PIPELINE, "tied_alone", Cause.SUM, "gradient"),
        (PIPELINE, "stage_norm", Cause.NORM, "gradient norm"),
        (PIPELINE, "tied_twice", Cause.NORM, "gradient norm"),
        (PIPELINE, "rounded_moments", Cause.DTYPE, "optimizer state"),
        ("zero1", "divided_by_micro_batches", Cause.SCALE, "gradient"),
        ("zero2", "zero_last_micro_batch", Cause.SUM, "gradient"),
        ("zero3", "zero3_means", Cause.SCALE, "gradient"),
        ("zero3", "zero_own_norm", Cause.NORM, "gradient norm"),
        ("{name: zero1, offload: cpu}", "half_masters", Cause.DTYPE, "weights"),
    ],
)
def test_a_mistake_in_a_strategy_is_found(verify: Verify, strategy: str, plant: str, cause: Cause, where: str) -> None:
    finding = verify(strategy, 2, CLIP, plant=plant).finding
    assert finding is not None, "not found"
    assert (finding.cause, finding.quantity) == (cause, where), "\n".join(finding.evidence)


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("overrides", "plant", "cause"),
    [
        (("loss=planted.mean_over_tokens", "data.train.lengths=true"), None, Cause.LOSS),
        (("model._target_=planted.HalfTransformer",), None, Cause.DTYPE),
        (("model._target_=planted.Counting", "model.kept=false"), None, Cause.BUFFER),
        (("model._target_=planted.Counting",), None, Cause.BUFFER),
        (("model._target_=planted.Counting",), "unshared", Cause.BUFFER),
        (("data.train._target_=planted.Unseeded",), None, Cause.CONTENTS),
        (("model={_target_: planted.Normed}",), None, Cause.STATISTICS),
    ],
)
def test_a_mistake_in_what_a_user_brings_is_found(
    verify: Verify, overrides: tuple[str, ...], plant: str | None, cause: Cause
) -> None:
    finding = verify("ddp", 2, *overrides, plant=plant, steps=1).finding
    assert finding is not None, "not found"
    assert finding.cause == cause, "\n".join(finding.evidence)


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "ranks", "overrides"),
    [
        ("ddp", 2, (CLIP,)),
        ("fsdp", 3, ("train.clip_grad_norm=1.0", "model.dropout=0.1")),
        ("{name: fsdp, replicate: 2}", 4, ("train.precision=bf16",)),
        ("ddp", 2, ("loss=parity.token_loss", "data.train.lengths=true", "train.micro_batch=null")),
        ("ddp", 3, ("train.precision=fp16", "train.activation_checkpointing=full")),
        (PIPELINE, 2, (CLIP,)),
        ("{name: fsdp, pipeline: 2}", 4, (CLIP,)),
        ("zero3", 2, (CLIP,)),
        ("{name: zero1, offload: cpu}", 2, (CLIP,)),
    ],
)
def test_a_clean_run_raises_no_alarm(verify: Verify, strategy: str, ranks: int, overrides: tuple[str, ...]) -> None:
    verdict = verify(strategy, ranks, *overrides)
    assert verdict.equal, verdict.finding
    assert {"loss", "gradient", "gradient norm", "optimizer state", "update of the weights"} <= verdict.largest.keys()
    assert any("dropout" in note for note in verdict.notes) == ("model.dropout=0.1" in overrides)


@pytest.mark.e2e
def test_a_parameter_to_which_the_loss_does_not_react_is_not_blamed(verify: Verify) -> None:
    """Adam makes full-size updates of its gradients, which are rounding noise around 0."""
    verdict = verify("ddp", 2, "model={_target_: planted.Keys}", steps=4)
    assert verdict.equal, verdict.finding
    assert verdict.indifferent == ("key.bias",)


@pytest.mark.e2e
def test_random_numbers_in_the_forward_are_refused_in_words(run: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "strategy=single", "model={_target_: planted.Chance}")
    Orders(steps=1, strategies=()).write(folder)
    assert run(folder, 1, entry=ENTRY) == [exits.NEVER_RETRY]
    assert "draws random numbers" in failure(folder)["message"]


@pytest.mark.e2e
def test_the_command(tmp_path: Path) -> None:
    for name in ("parity.py", "planted.py"):
        shutil.copy(Path(__file__).parent / "assets" / name, tmp_path)
    (tmp_path / "cfg.yaml").write_text(json.dumps({**PARITY, "cluster": {"procs_per_node": 2}}))
    wrong = ["loss=planted.mean_over_tokens", "data.train.lengths=true", "--steps", "1"]
    found = _dtrain(tmp_path, "verify", "cfg.yaml", *wrong, "--against", "ddp", "--against", PIPELINE, "--json")
    assert found.returncode == 1, found.stdout + found.stderr
    answers = json.loads(found.stdout)
    assert [(a["strategy"]["name"], a["strategy"]["pipeline"], a["steps"]) for a in answers] == [
        ("ddp", 1, 1),
        ("ddp", 2, 1),
    ]
    assert {a["finding"]["cause"] for a in answers} == {"loss normalization"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.yaml", "parity.py", "planted.py"]


def test_what_is_said_fits_on_a_screen(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(json.dumps({**PARITY, "cluster": {"procs_per_node": 2}}))
    config = load_config(tmp_path / "cfg.yaml", ["strategy=fsdp"])
    plan = make_plan(config, job_id="job", argv=["dtrain"], cwd=str(tmp_path))
    asked = Asked(words="fsdp", config=config, plan=plan)
    finding = Finding(
        cause=Cause.SCALE, step=3, quantity="gradient", tensor="w", evidence=("word " * 60,) * 4, advice="word " * 60
    )
    rounding = Largest(relative=3e-8, tensor="w", step=2)
    differs = list(lines(Answer(asked=asked, verdict=Verdict(steps=5, finding=finding, notes=("more",)))))
    equal = list(lines(Answer(asked=asked, verdict=Verdict(steps=5, finding=None, largest={"gradient": rounding}))))
    assert differs[:3] == [
        "cfg: fsdp on 2 ranks against one process, 5 steps",
        "  THEY DIFFER: gradient scale",
        "  first        gradient of w, in step 3",
    ]
    assert equal[1:] == [
        "  no difference beyond rounding; the largest ones, relative:",
        "    gradient               3.0e-08  w, step 2",
    ]
    assert len(differs) < 24
    assert max(map(len, differs)) <= 120


def test_one_rank_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(json.dumps(PARITY))
    found = _dtrain(tmp_path, "verify", "cfg.yaml")
    assert (found.returncode, "one rank, so there is nothing to compare" in found.stderr) == (2, True)


def _dtrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain.launcher.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


# ---- the arithmetic ----


@pytest.mark.parametrize("parts", [(1, 1), (3, 1), (2, 5)])
def test_the_pieces_of_a_large_tensor_are_those_of_the_whole(parts: tuple[int, int]) -> None:
    shape = (300, 401)
    tensor = np.random.default_rng(0).random(shape)
    wanted = tensor.reshape(-1)[chosen(shape)]
    assert len(wanted) == LIMIT
    found = np.full(LIMIT, np.nan)
    for box in grid_boxes(shape, parts):
        numbers, places = inside(shape, box)
        part = tensor[box.relative_to(Box((0, 0), shape))]
        assert np.isnan(found[numbers]).all()
        found[numbers] = part.reshape(-1)[places]
    assert np.array_equal(found, wanted)


def test_what_a_sum_is_made_of() -> None:
    random = np.random.default_rng(1)
    first, second = random.standard_normal((2, 50))
    shares = {(0, 0): {"w": first}, (1, 0): {"w": second}}
    found = mixture({"w": (2.0 * first + 0.5 * second) / 7}, shares, 7.0)
    assert found is not None
    assert list(found.weights.values()) == pytest.approx([2.0, 0.5])
    assert found.rest < 1e-12
    assert multiple(3.0 * first, first).factor == pytest.approx(3.0)
    assert multiple(second, first).rest > 0.5
