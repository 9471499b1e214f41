"""Which cores a worker gets, and that its process is bound to them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.runtime.cpus import USERS_OWN, describe, slice_of_cores

EIGHT = range(8)


def cut(
    node: int,
    local: int,
    *,
    backend: str = "slurm",
    shape: tuple[int, int] = (2, 2),
    environ: Mapping[str, str] | None = None,
) -> tuple[int, ...]:
    return slice_of_cores(EIGHT, environ or {}, backend=backend, node_rank=node, local_rank=local, shape=shape)


def test_nodes_of_one_machine_share_its_cores_and_others_do_not() -> None:
    assert [cut(node, local) for node in (0, 1) for local in (0, 1)] == 2 * [(0, 1, 2, 3), (4, 5, 6, 7)]
    on_one = [cut(node, local, backend="local") for node in (0, 1) for local in (0, 1)]
    assert on_one == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_too_few_cores_too_many_threads_or_a_person_with_other_plans() -> None:
    assert cut(0, 0, shape=(1, 9)) == ()
    assert cut(0, 0, shape=(1, 1)) == ()  # nobody to keep away from
    assert cut(0, 1, environ={"OMP_NUM_THREADS": "4"}) == (4, 5, 6, 7)
    assert cut(0, 1, environ={"OMP_NUM_THREADS": "5"}) == ()
    assert cut(0, 1, environ={"OMP_NUM_THREADS": "2,1"}) == (4, 5, 6, 7)
    for name in USERS_OWN:
        assert cut(0, 1, environ={name: "x"}) == ()


@given(st.sets(st.integers(0, 300), max_size=64), st.integers(1, 4), st.integers(1, 8))
def test_slices_are_equal_disjoint_and_inside(cores: set[int], nodes: int, workers: int) -> None:
    slices = [
        slice_of_cores(cores, {}, backend="local", node_rank=node, local_rank=local, shape=(nodes, workers))
        for node in range(nodes)
        for local in range(workers)
    ]
    taken = [core for each in slices for core in each]
    assert len(taken) == len(set(taken))
    assert set(taken) <= cores
    assert len({len(each) for each in slices}) == 1
    assert all(slices) == (len(cores) >= nodes * workers > 1)


@pytest.mark.parametrize(
    ("cores", "text"), [([0], "0"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 8], "0,2-3,8"), ([5, 6, 9, 10, 11], "5-6,9-11")]
)
def test_words(cores: list[int], text: str) -> None:
    assert describe(cores) == text
