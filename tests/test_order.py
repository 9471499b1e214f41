"""Sample order: every sample once an epoch, a pure function of (seed, position), whatever the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.runtime.data import BatchPlan
from dtrain.runtime.order import sample_indices
from dtrain.runtime.shares import num_micro_batches, rank_slice


@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    indices = sample_indices(positions, num_samples, seed, shuffle=True)
    assert sorted(indices.tolist()) == list(range(num_samples))


@given(
    num_samples=st.integers(1, 500), seed=st.integers(0, 2**32), start=st.integers(0, 2000), count=st.integers(1, 50)
)
def test_order_does_not_depend_on_how_it_is_asked(num_samples: int, seed: int, start: int, count: int) -> None:
    together = sample_indices(np.arange(start, start + count), num_samples, seed, shuffle=True).tolist()
    apart = [
        sample_indices(np.arange(p, p + 1), num_samples, seed, shuffle=True)[0] for p in range(start, start + count)
    ]
    assert together == apart


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {
        tuple(sample_indices(np.arange(e * 100, e * 100 + 100), 100, seed, shuffle=True).tolist())
        for seed in range(20)
        for e in range(20)
    }
    assert len(orders) == 400


def test_order_looks_random() -> None:
    """Where sample 0 lands, and what lies next to it, is near uniform over many seeds (chi-square, 5 sigma)."""
    num_samples, trials = 16, 4000
    places: Counter[int] = Counter()
    steps: Counter[int] = Counter()
    for seed in range(trials):
        order = sample_indices(np.arange(num_samples), num_samples, seed, shuffle=True)
        places[int(np.flatnonzero(order == 0)[0])] += 1
        steps[int((order[1] - order[0]) % num_samples)] += 1
    for counts, kinds in ((places, num_samples), (steps, num_samples - 1)):
        expected = trials / kinds
        chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
        assert len(counts) == kinds
        assert chi2 < kinds + 5 * (2 * kinds) ** 0.5


def test_without_shuffle_the_order_is_the_data_sets() -> None:
    assert sample_indices(np.arange(8, 13), 10, 0, shuffle=False).tolist() == [8, 9, 0, 1, 2]


@settings(max_examples=30)  # a plan computes 64 steps at once, whatever is asked for
@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    micro_batch=st.one_of(st.none(), st.integers(1, 9)),
)
def test_all_ranks_together_see_the_stream_exactly_once_across_resizes(
    num_samples: int, batch_size: int, worlds: list[int], micro_batch: int | None
) -> None:
    """One step at each world size in turn, as after resizes; a batch may cross the end of an epoch."""
    seen: list[int] = []
    for step, world_size in enumerate(worlds, start=1):
        plans = [
            BatchPlan(
                num_samples,
                batch_size=batch_size,
                seed=3,
                shuffle=True,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                start_step=step - 1,
                start_position=(step - 1) * batch_size,
            )
            for rank in range(world_size)
        ]
        assert len({plan.num_micro_batches for plan in plans}) == 1  # collectives are counted
        for plan in plans:
            for pairs, weight in plan.micro_batches(step):
                assert len(pairs) >= 1  # a rank without samples joins with a borrowed one
                assert micro_batch is None or len(pairs) <= micro_batch
                seen += [index for _, index in pairs[:weight]]
    total = batch_size * len(worlds)
    expected = sample_indices(np.arange(total), num_samples, 3, shuffle=True).tolist()
    assert seen == expected


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 3), (1, 4), (7, 7), (10, 4)])
def test_slices_cover_the_batch_evenly(batch_size: int, world_size: int) -> None:
    slices = [rank_slice(batch_size, rank, world_size) for rank in range(world_size)]
    assert [i for part in slices for i in part] == list(range(batch_size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    assert num_micro_batches(batch_size, world_size, 2) == -(-max(map(len, slices)) // 2)
