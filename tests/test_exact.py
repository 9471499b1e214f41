"""train.exact: one SHA-256 of the final state over layouts, world sizes, and schedules of kills, stops and resizes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PARITY, Ask, Run, failure, numbers, prepare, rank_functions, rank_runner
from hypothesis import given
from hypothesis import strategies as st
from savedstate import committed, digest

from dtrain.cluster.errors import ConfigError
from dtrain.strategies.exactgradients import _add as add
from dtrain.strategies.exacttree import GrowingSums, LogicalShards, fold
from dtrain.strategies.exactupdate import row_squares

STEPS, SHARDS = 8, 8
SMALL = {"_target_": "parity.Transformer", "vocab": 256, "width": 64, "dropout": 0.1}
# Dropout in the model and noise in the data; groups, clipping, a schedule; counts that differ from sample to sample.
EXACT: dict[str, Any] = {
    **PARITY,
    "model": SMALL,
    "loss": "parity.token_loss",
    "count": "parity.count_targets",
    "data": {
        "train": {"_target_": "parity.Tokens", "vocab": 256, "noise": 0.1, "lengths": True},
        "batch_size": 19,  # two or three samples a logical shard
    },
    "train": {"steps": STEPS, "clip_grad_norm": 0.5, "micro_batch": 2, "exact": SHARDS},
    "checkpoint": {"every": 2, "keep": None},
}
LAYOUTS = [("single", 1)] + [(name, size) for size in (1, 2, 3, 4) for name in ("ddp", "fsdp")] + [("hsdp", 4)]


@pytest.fixture(scope="module")
def run() -> Run:
    return rank_runner(preload=["parity"])


@pytest.fixture(scope="module")
def ask() -> Ask:
    return rank_functions(module="odd_models")


def overrides(layout: str, size: int) -> list[str]:
    strategy = "{name: fsdp, replicate: 2}" if layout == "hsdp" else layout
    return [f"strategy={strategy}", f"cluster.procs_per_node={size}"]


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("one") / "run", *overrides("single", 1), base=EXACT)
    assert run(folder, 1) == [0]
    return folder


def assert_same(folder: Path, one: Path) -> None:
    assert numbers(folder) == numbers(one), "losses and norms of every step"
    assert digest(folder, STEPS) == digest(one, STEPS)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_every_layout_gives_the_same_bits(run: Run, one: Path, tmp_path: Path) -> None:
    for layout, size in LAYOUTS[1:]:
        folder = prepare(tmp_path / f"{layout}-{size}", *overrides(layout, size), base=EXACT)
        assert run(folder, size) == [0] * size, (layout, size)
        assert_same(folder, one)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_kills_stops_and_resizes_leave_the_same_bits(run: Run, one: Path, tmp_path: Path) -> None:
    """Ten random schedules, each in one run directory: what an attempt leaves, another layout goes on with."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(10):
        folder = tmp_path / str(number)
        plan = []
        for attempt in range(1, 100):
            layout, size = chance.choice(LAYOUTS)
            how, at = chance.choice(["stop_at", "kill_at"]), chance.randrange(1, STEPS)
            again = folder / str(attempt)
            prepare(again, *overrides(layout, size), f"checkpoint.url={folder / 'checkpoints'}", base=EXACT)
            if attempt > 1:
                (again / "metrics.jsonl").write_text((folder / str(attempt - 1) / "metrics.jsonl").read_text())
            resume = committed(folder)[-1:] or [(0, 0)]
            plan.append((layout, size, how, at, resume[0]))
            interrupt = {} if attempt > 2 or at <= resume[0][0] else {how: at}
            codes = run(again, size, attempt=attempt, resume=list(resume[0]), **interrupt)
            assert all(code in (0, 85, -9, -15) for code in codes), (seed, plan, codes)
            if codes == [0] * size:
                break
        assert numbers(again) == numbers(one), (seed, plan)
        assert digest(folder, STEPS) == digest(one, STEPS), (seed, plan)


BF16 = ["train.precision=bf16", "train.activation_checkpointing=full"]
STEEP = ["loss=parity.steep_loss", "count=null", "optimizer={_target_: torch.optim.SGD, lr: 0.01}"]


@pytest.mark.e2e
@pytest.mark.parametrize("more", [BF16, ["train.precision=fp16", *STEEP]], ids=["bf16", "fp16"])
def test_other_precisions_too(run: Run, tmp_path: Path, more: list[str]) -> None:
    """bf16 with recomputed activations; fp16 with steps that are skipped."""
    found = []
    for layout, size in (("single", 1), ("ddp", 3), ("fsdp", 2)):
        folder = prepare(tmp_path / layout, *overrides(layout, size), *more, base=EXACT)
        assert run(folder, size) == [0] * size
        found.append((numbers(folder), digest(folder, STEPS)))
    assert found[0] == found[1] == found[2]


ODD = ["Branches", "tied_across", "reused", "frozen", "two_dtypes", "ChannelsLast", "sequential", "Scalar", "narrow"]
REFUSED = {"Codebook": "changes its buffer", "normed": "whose statistics are those of the samples"}


@pytest.mark.e2e
def test_odd_models_too(ask: Ask) -> None:
    """Parameters that only some samples use, ties, other dtypes, memory formats, frozen ones."""
    for model in (*ODD, *REFUSED):
        (wanted,) = ask("learn", 1, model=model, strategy="single", exact=4)
        if model in REFUSED:
            assert REFUSED[model] in wanted["message"]
            continue
        for strategy, size in (("ddp", 3), ("fsdp", 3)):
            for found in ask("learn", size, model=model, strategy=strategy, exact=4):
                if strategy == "fsdp" and model in ("Scalar", "ChannelsLast"):  # as without exact
                    assert found["error"] == "UsageError"
                else:
                    assert found == wanted, (model, strategy, size)


def refusal(tmp_path: Path, *more: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path / "run", *more, base=EXACT)
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["strategy=ddp", "cluster.procs_per_node=9"],
            "train.exact.shards: 8 for 9 ranks: each needs one. Set at least 9",
        ),
        (["train.exact=20"], "train.exact.shards: 20 parts of the 19 samples of data.batch_size"),
        (["train.compile=true"], "train.exact: does not go with train.compile"),
        (["optimizer.fused=true"], "optimizer.fused: a fused optimizer rounds"),
        (["optimizer.groups.0.fused=true"], "optimizer.groups.0.fused: a fused optimizer rounds"),
        (["train.exact=true"], "train.exact: expects a mapping, or a number for its shards"),
    ],
)
def test_what_it_does_not_go_with_is_known_before_the_start(tmp_path: Path, more: list[str], words: str) -> None:
    assert words in refusal(tmp_path, *more)


@pytest.mark.e2e
def test_an_iterable_data_set_is_refused(run: Run, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", "data.train={_target_: streams.generated, lengths: [99]}", base=EXACT)
    assert run(folder, 1) == [93]
    assert "train.exact: generator is iterable" in failure(folder)["message"]


# ---- the tree and the norm, without ranks ----

Sizes = st.integers(1, 24)


@given(num=Sizes, world_size=Sizes, seed=st.integers(0, 2**32))
def test_the_sum_does_not_depend_on_who_has_which_shards(num: int, world_size: int, seed: int) -> None:
    world_size = min(world_size, num)
    chance = random.Random(seed)
    values = [chance.uniform(-1, 1) * 10.0 ** chance.randrange(-12, 12) for _ in range(num)]
    wanted = fold((0, num), {(i, i + 1): value for i, value in enumerate(values)}, lambda a, b: a + b)
    known: dict[tuple[int, int], float] = {}
    for rank in range(world_size):
        shards = LogicalShards(num=num, rank=rank, world_size=world_size)
        sums: list[tuple[tuple[int, int], float]] = []
        for shard in shards.mine:
            GrowingSums(num).add_to(sums, shard, values[shard], lambda a, b: a + b)
        assert [node for node, _ in sums] == shards.sums_of(rank)
        assert len(shards.mine) <= shards.most
        known |= dict(sums)
    assert fold((0, num), known, lambda a, b: a + b) == wanted


def test_no_gradient_adds_up_as_one_of_zeros() -> None:
    """Which samples a shard has decides which it is: 0 + -0 is 0, and -0 alone would stay."""
    zeros, minus = torch.zeros(2), torch.tensor([-0.0, 1.0])
    for left, right in ((minus.clone(), None), (None, minus.clone())):
        (lonely,), (both,) = add([left], [right]), add([zeros.clone()], [minus])
        assert lonely is not None
        assert both is not None
        assert torch.equal(lonely.signbit(), both.signbit())


@given(num=Sizes, world_size=Sizes, parts=st.integers(1, 3))
def test_shards_are_dealt_once_and_values_reach_theirs(num: int, world_size: int, parts: int) -> None:
    world_size = min(world_size, num)
    ranks = [LogicalShards(num=num, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [shard for rank in ranks for shard in rank.mine] == list(range(num))
    assert ranks[0].most == max(len(rank.mine) for rank in ranks), "and nobody goes through more"
    total = [0.0] * num
    for rank in ranks:
        values = [float(shard) for shard in rank.mine for _ in range(parts)]
        values += [0.0] * (rank.most * parts - len(values))
        total = [a + b for a, b in zip(total, rank.by_shard(values), strict=True)]
    assert total == [float(shard * parts) for shard in range(num)]


def test_a_rows_square_does_not_depend_on_the_rows_beside_it() -> None:
    rows = torch.randn(37, 203, generator=torch.Generator().manual_seed(1))
    together = row_squares(rows)
    for size in (1, 5, 36):
        assert torch.equal(torch.cat([row_squares(part) for part in torch.split(rows, size)]), together)
    assert torch.allclose(together, rows.double().square().sum(1), rtol=1e-14)
