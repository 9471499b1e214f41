"""`strategy: horovod` on Horovod itself: the losses of one process, the same bits after a resume, anybody's
checkpoints, and models that are hard on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import PARITY, Ask, Run, losses, metrics, numbers, prepare, rank_functions, rank_runner
from cases import worst_difference as worst
from parity import TOLERANCE
from slurmcluster import SlurmCluster

pytest.importorskip("horovod", reason="needs Horovod: python -m dtrain.launcher.build_horovod")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

REPO = Path(__file__).resolve().parent.parent
DTRAIN = Path(sys.executable).parent / "dtrain"
KEPT = ["checkpoint.every=40", "checkpoint.keep=null"]


def ranks(number: int, strategy: str = "horovod") -> list[str]:
    """Overrides; the number is what the check of the layout counts, the ranks are the test's."""
    return [f"strategy={strategy}", f"cluster.procs_per_node={number}"]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner({"PYTHONPATH": str(REPO / "examples")})


@pytest.fixture(scope="module")
def ask() -> Ask:
    return rank_functions()


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 50 steps, with a checkpoint of step 40."""
    folder = prepare(tmp_path_factory.mktemp("one") / "run", *KEPT)
    assert run(folder, 1) == [0]
    return folder


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same on some ranks, once each."""
    known: dict[int, Path] = {}

    def train(world_size: int) -> Path:
        if world_size not in known:
            folder = prepare(tmp_path_factory.mktemp(f"on-{world_size}") / "run", *ranks(world_size), *KEPT)
            assert run(folder, world_size) == [0] * world_size
            known[world_size] = folder
        return known[world_size]

    return train


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_it_gives_the_losses_of_one_process(one: Path, whole: Callable[[int], Path], world_size: int) -> None:
    """Accumulated in micro-batches of 4, two groups, clipped."""
    folder = whole(world_size)
    assert worst(losses(folder), losses(one)) <= TOLERANCE["fp32"]
    norms, wanted = ([r["grad_norm"] for r in metrics(f)] for f in (folder, one))
    assert norms == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("world_size", [3, 4])
def test_a_resume_gives_the_same_bits(run: Run, whole: Callable[[int], Path], tmp_path: Path, world_size: int) -> None:
    """At two ranks any order of a sum is the same. Horovod's own fusion differs from run to run here."""
    before = whole(world_size)
    folder = prepare(tmp_path / "run", *ranks(world_size), f"checkpoint.url={before / 'checkpoints'}")
    assert run(folder, world_size, attempt=2, resume=[40, 1]) == [0] * world_size
    assert numbers(folder) == numbers(before)[40:]


def test_fp16_skips_on_all_ranks_and_resumes_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    more = ["train.precision=fp16", "loss=parity.steep_loss", "train.steps=12", "train.clip_grad_norm=null"]
    before = prepare(tmp_path / "whole", *ranks(2), *more, "checkpoint.every=4")
    assert run(before, 2) == [0, 0]
    skipped = [record["step"] for record in metrics(before) if record.get("skipped")]
    assert skipped[0] < 4 < skipped[-1] < 12
    halves = prepare(tmp_path / "halves", *ranks(2), *more, f"checkpoint.url={before / 'checkpoints'}")
    assert run(halves, 2, attempt=2, resume=[4, 1]) == [0, 0]
    assert numbers(halves) == numbers(before)[4:]


def test_bf16_keeps_fp32_state(run: Run, one: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", *ranks(2), "train.precision=bf16", "train.steps=10")
    assert run(folder, 2) == [0, 0]
    assert (
        0 < worst(losses(folder), losses(one)[:10]) <= 10 * TOLERANCE["bf16"]
    )  # another schedule: its steps are fewer
    manifest = json.loads(next((folder / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert {tensor["dtype"] for tensor in manifest["tensors"].values()} == {"F32", "I64"}


def test_loader_processes_beside_its_thread(run: Run, whole: Callable[[int], Path], tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", *ranks(2), "data.workers=1", "train.steps=50", "checkpoint.every=null")
    assert run(folder, 2) == [0, 0]
    assert numbers(folder) == numbers(whole(2))


# ---- models that are hard on it ----


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("model", ["Branches", "tied_across", "frozen", "two_dtypes", "ChannelsLast"])
def test_odd_models_learn_what_one_process_learns(ask: Ask, model: str) -> None:
    """Parameters that no rank, or only some, or only some micro-batches use: nothing hangs, none moves by momentum."""
    (alone,) = ask("odd_models.learn", 1, model=model, strategy="single")
    for found in ask("odd_models.learn", 3, model=model, strategy="horovod", parts=3):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for name, values in alone["parameters"].items():
            assert flat(found["parameters"][name]) == pytest.approx(flat(values), abs=1e-6), name


def test_a_parameter_that_only_one_rank_uses_hangs_nobody(ask: Ask) -> None:
    """Its group is complete there and nowhere else."""
    first, second = ask("horovods.train", 2, model="OnlyFirst")
    assert first == second


def test_sparse_gradients_add_up_as_dense_ones_do(ask: Ask) -> None:
    (alone,) = ask("horovods.train", 1, model="dense_table")
    for found in ask("horovods.train", 2, model="Table"):
        assert flat(found) == pytest.approx(flat(alone), rel=1e-5)


def test_all_ranks_start_with_what_rank_0_built(ask: Ask) -> None:
    first, second = ask("horovods.first_weights", 2)
    assert first == second


@pytest.mark.parametrize(
    ("model", "words"), [("half", ["bfloat16", "weight", "train.precision"]), ("Reentrant", ["use_reentrant=False"])]
)
def test_what_horovod_cannot_do_is_said_in_words(ask: Ask, model: str, words: list[str]) -> None:
    for found in ask("horovods.train", 2, model=model):
        assert found["error"] == "UsageError"
        assert all(word in found["message"] for word in words)


def test_nothing_listens_once_the_ranks_have_joined(ask: Ask) -> None:
    for found in ask("horovods.what_is_left", 2):
        assert found == {"address": "127.0.0.1", "answers": False, "threads": []}


def test_what_is_summed_together_is_fixed(ask: Ask) -> None:
    """Whether Horovod fuses otherwise in a short run is chance: so what would let it is looked at."""
    for found in ask("horovods.groups", 2):
        assert found == {"shapes": [[[1], [1, 6], [3, 6]]], "alone": "1"}


# ---- a whole run: test_relaunch.py has one on one machine ----


@pytest.mark.slow
def test_machines_with_addresses_of_their_own(run: Run, slurm: SlurmCluster, tmp_path: Path) -> None:
    """Each in a network namespace, where loopback leads nowhere."""
    config = tmp_path / "cfg.yaml"
    base = {**PARITY, "train": {"steps": 6}, "schedule": "constant"}
    config.write_text(json.dumps({**base, "strategy": "horovod"}))
    shutil.copy(REPO / "tests" / "assets" / "parity.py", tmp_path)
    command = [sys.executable, "-P", "-m", "dtrain.launcher.cli", "launch", "--backend", "slurm", "--nodes", "2"]
    argv, environ, _ = slurm.command(*command, "--run-dir", str(tmp_path / "run"), str(config))
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env={**environ, **own},
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here = prepare(tmp_path / "here", *ranks(2), base=base)
    assert run(here, 2) == [0, 0]
    assert numbers(tmp_path / "run") == numbers(here)
