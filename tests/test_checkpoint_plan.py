"""Who writes what: every element once, the same decision on every rank, and the manifest says the same."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster.errors import CheckpointError
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.manifest import BoxesRule, GridRule
from dtrain.runtime.checkpoint.plan import manifest_tensors, plan_shares
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec, flat_boxes, replicated, sharded, whole


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, list[TensorSpec]]:
    """Tensors of any shape, each part held by any ranks: replicated, sharded, both, and stranger."""
    world_size = draw(st.integers(1, 5))
    specs = []
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        layout: Layout | Patches
        kind = draw(st.sampled_from(["replicated", "sharded", "any", "flat"]))
        if kind == "replicated" or not shape:
            layout = replicated(len(shape), world_size)
        elif kind == "sharded":
            layout = sharded(len(shape), draw(st.integers(0, len(shape) - 1)), tuple(range(world_size)))
        elif kind == "flat":
            layout = _cut_flat(shape, world_size, draw(st.booleans()))
        else:
            parts = tuple(draw(st.integers(1, 3)) for _ in shape)
            ranks = st.lists(st.integers(0, world_size - 1), min_size=1, unique=True).map(tuple)
            layout = Layout(parts, tuple(draw(ranks) for _ in range(math.prod(parts))))
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "I64"]))
        specs.append(TensorSpec(name=f"t{number}", dtype=dtype, shape=shape, layout=layout))
    return world_size, specs


def _cut_flat(shape: tuple[int, ...], world_size: int, twice: bool) -> Patches:
    """As ZeRO cuts: flat ranges of one size, the last with padding. `twice`: every range has two owners."""
    step = -(-math.prod(shape) // world_size)
    found = []
    for rank in range(world_size):
        owners = tuple(sorted({rank, (rank + 1) % world_size})) if twice else (rank,)
        found += [(box, owners) for box in flat_boxes(shape, rank * step, (rank + 1) * step)]
    return Patches(tuple(found))


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(0, 700), st.integers(0, 700))
def test_a_flat_range_is_a_few_boxes_in_its_order(shape: tuple[int, ...], one: int, other: int) -> None:
    begin, end = sorted((one, other))
    boxes = flat_boxes(shape, begin, end)
    everything = _elements(whole(shape))
    assert [element for box in boxes for element in _elements(box)] == everything[begin:end]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.num_elements for box in boxes)


def _elements(box: Box) -> list[tuple[int, ...]]:
    return list(product(*(range(o, o + s) for o, s in zip(box.offsets, box.shape, strict=True))))


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_every_element_is_written_once_by_a_rank_that_holds_it(world: tuple[int, list[TensorSpec]]) -> None:
    world_size, specs = world
    written: dict[str, Counter[tuple[int, ...]]] = {spec.name: Counter() for spec in specs}
    by_name = {spec.name: spec for spec in specs}
    said = manifest_tensors(specs, world_size)
    for rank in range(world_size):
        for share in plan_shares(specs, rank, world_size):
            spec = by_name[share.name]
            assert share.box.num_elements
            written[share.name].update(_elements(share.box))
            parts = spec.layout.cells(spec.shape)
            (part,) = [box for box, owners in parts if share.box.intersect(box) == share.box and rank in owners]
            _assert_contiguous(share.box, part)
            assert (rank, share.box) in list(said[share.name].stored_boxes(whole(spec.shape)))
    for spec in specs:
        assert written[spec.name] == Counter(_elements(whole(spec.shape)))
        stored = list(said[spec.name].stored_boxes(whole(spec.shape)))
        assert sum(box.num_elements for _, box in stored) == math.prod(spec.shape)


def _assert_contiguous(box: Box, part: Box) -> None:
    cut = [dim for dim in range(len(box.shape)) if box.shape[dim] != part.shape[dim]]
    assert len(cut) <= 1
    assert all(part.shape[dim] == 1 for dim in range(cut[0] if cut else 0))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_replicas_share_the_bytes_evenly_inside_tensors_too(world_size: int) -> None:
    layout = replicated(2, world_size)
    specs = [
        TensorSpec(name="big", dtype="F32", shape=(10_000, 16), layout=layout),
        TensorSpec(name="small", dtype="BF16", shape=(100, 10), layout=layout),
    ]
    dtypes = {spec.name: spec.dtype for spec in specs}
    loads = [
        sum(share.box.num_elements * item_bytes(dtypes[share.name]) for share in plan_shares(specs, rank, world_size))
        for rank in range(world_size)
    ]
    assert max(loads) - min(loads) <= 2 * 64  # a row or two


def test_rules_are_grids_where_they_can_be() -> None:
    specs = [
        TensorSpec(name="a", dtype="F32", shape=(6, 2), layout=sharded(2, 0, (0, 1, 2, 3))),
        TensorSpec(name="b", dtype="F32", shape=(1000,), layout=replicated(1, 4)),
        TensorSpec(name="c", dtype="F32", shape=(), layout=replicated(0, 4)),
    ]
    rules = {name: info.layout for name, info in manifest_tensors(specs, 4).items()}
    assert rules["a"] == GridRule(parts=(4, 1), writers=((0, 4),))
    split = [(0, (250,)), (1, (251,)), (2, (250,)), (3, (249,))]  # 4004 bytes in four, at the nearest element
    assert isinstance(rules["b"], BoxesRule)
    assert [(writer, box.shape) for writer, box in rules["b"].boxes] == split
    assert rules["c"] == GridRule(parts=(), writers=((3, 1),))


def test_a_layout_outside_the_world_is_refused() -> None:
    specs = [TensorSpec(name="a", dtype="F32", shape=(4,), layout=replicated(1, 4))]
    with pytest.raises(CheckpointError, match="world of 2 ranks"):
        plan_shares(specs, 0, 2)


def test_planning_does_not_grow_with_the_world() -> None:
    """Counted, not timed: a rank looks at its own parts only, once a shape."""
    layout = sharded(1, 0, tuple(range(64)))
    seen = 0

    class Owners(tuple[tuple[int, ...], ...]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal seen
            seen += 1
            return super().__iter__()

    layout = Layout(layout.parts, Owners(layout.owners))
    specs = [TensorSpec(name=f"t{i}", dtype="F32", shape=(64,), layout=layout) for i in range(500)]
    assert len(plan_shares(specs, 3, 64)) == 500
    assert seen == 1
