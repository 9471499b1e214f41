"""What of a model is cut over tensor ranks: given, brought by the model, or found by its layers; where parts lie."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from dtrain.cluster.errors import UsageError
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.layout import check_layout, degrees_of
from dtrain.strategies.placement import _spans
from dtrain.strategies.tensorcuts import _part, parameter_cut
from dtrain.strategies.tensorplan import Cut, Plan, describe, tensor_plan


class Block(nn.Module):
    """Linear layers of these shapes, in this order."""

    def __init__(self, *shapes: tuple[int, int], heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.layers = nn.ModuleDict({f"l{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)})


def model(*shapes: tuple[int, int], heads: int = 4) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(*shapes, heads=heads)])})


def words(plan: Plan) -> dict[str, str]:
    return {
        cut.name.rpartition(".")[2]: f"{cut.word} {cut.blocks}" if cut.blocks > 1 else cut.word for cut in plan.cuts
    }


W, M = 8, 32
QKV, SQUARE, UP, DOWN, FEWER = (W, 3 * W), (W, W), (W, M), (M, W), (W, W // 2)


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([QKV, SQUARE, UP, DOWN], "column 3, row, column, row"),
        ([SQUARE, SQUARE, SQUARE, SQUARE, UP, UP, DOWN], "column, column, column, row, column, column, row"),
        ([SQUARE, FEWER, FEWER, SQUARE, UP, DOWN, UP], "column, column, column, row, column, row, column"),
        ([(W, 2 * M), DOWN], "column 2, row"),
        ([(W, 1), QKV, SQUARE], ", column 3, row"),  # a gate for one number stays whole
    ],
)
def test_a_blocks_layers_are_known_by_their_shapes(shapes: list[tuple[int, int]], wanted: str) -> None:
    found = words(tensor_plan(model(*shapes), {}, 2))
    assert ", ".join(found.get(f"l{i}", "") for i in range(len(shapes))) == wanted


def test_the_vocabulary_is_cut_where_it_is_read_and_where_it_is_written() -> None:
    whole = nn.ModuleDict({
        "words": nn.Embedding(100, W), "places": nn.Embedding(16, W), "out": nn.Linear(W, 100, bias=False),
        "blocks": nn.ModuleList([Block(QKV, SQUARE)]),
    })  # fmt: skip
    found = words(tensor_plan(whole, {}, 2))
    assert found == {"l0": "column 3", "l1": "row", "words": "embedding", "out": "head"}
    line = describe(tensor_plan(whole, {}, 2), 2, sequence=True)
    assert line == "tensor 2: 4 modules cut by the shapes of its layers, sequences between them"


def test_the_first_pattern_that_fits_counts() -> None:
    plan = tensor_plan(model(UP, DOWN), {"*.l1": "row", "blocks.*.l?": "column"}, 2)
    assert (words(plan), plan.origin) == ({"l0": "column", "l1": "row"}, "by strategy.tensor_plan")


def test_a_models_own_plan_comes_before_the_shapes() -> None:
    own = model(UP, DOWN)
    own.tp_plan = {"blocks.*.l0": "colwise", "blocks.*.l1": "rowwise"}  # type: ignore[assignment]
    plan = tensor_plan(own, {}, 2)
    assert (words(plan), plan.origin) == ({"l0": "column", "l1": "row"}, "by the model's own plan")
    own.tp_plan = {"blocks.*.l0": "grouped_gemm"}  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"brings uses grouped_gemm, which is not supported.*strategy.tensor_plan"):
        tensor_plan(own, {}, 2)


@pytest.mark.parametrize(
    ("shapes", "given", "degree", "message"),
    [
        ([QKV, SQUARE], {}, 3, "tensor 3 does not divide the 4 heads of blocks.0 (num_heads)"),
        (
            [QKV, SQUARE],
            {"*.l0": "column 5"},
            2,
            "l0 has 24 outputs, which 5 blocks x tensor 2 does not divide",
        ),
        ([UP, DOWN], {"*.l1": "row"}, 5, "blocks.0.layers.l1 has 32 inputs, which tensor 5 does not divide"),
        ([(W, 1)], {}, 2, "tensor 2 cuts nothing of this model: no attention or MLP was found"),
        ([UP], {"*.l0": "whole"}, 2, "cuts nothing of this model: its plan names no module to cut"),
        ([UP], {"*.up": "column"}, 2, "'*.up' matches no module that is left. There are: blocks, blocks.0"),
        ([UP], {"*.l0": "embedding"}, 2, "embedding is for an embedding, and blocks.0.layers.l0 is a Linear"),
        ([UP], {"blocks": "row"}, 2, "row is for a linear layer, and blocks is a ModuleList"),
    ],
)
def test_what_does_not_fit_is_refused(
    shapes: list[tuple[int, int]], given: dict[str, str], degree: int, message: str
) -> None:
    heads = 5 if degree == 5 else 4
    with pytest.raises(UsageError, match=re.escape(message)):
        tensor_plan(model(*shapes, heads=heads), given, degree)


def test_degrees_multiply_to_the_ranks() -> None:
    config = StrategyConfig(name="fsdp", tensor=2, replicate=2)
    assert (degrees_of(config, 8).shard, degrees_of(config, 8).data) == (2, 4)
    assert degrees_of(StrategyConfig(name="ddp", tensor=2), 4).replicate == 2
    ((key, message),) = check_layout(StrategyConfig(name="fsdp", shard=2, replicate=2, tensor=2), 2, 2)
    assert key == "strategy.replicate"
    assert message.startswith("fsdp replicate 2 x shard 2 x tensor 2 = 8 ranks, but 2 nodes x 2 = 4. Set ")
    ((_, message),) = check_layout(StrategyConfig(name="ddp", tensor=3), 1, 4)
    assert message.startswith("ddp replicate auto x tensor 3: 3 does not divide 1 node x 4 = 4 ranks.")
    ((_, message),) = check_layout(StrategyConfig(name="ddp", sequence_parallel=True), 1, 4)
    assert message.startswith("sequence_parallel is given, but tensor is 1")
    assert check_layout(StrategyConfig(name="single", tensor=2), 1, 1)


def test_a_rank_has_its_heads_of_each_matrix() -> None:
    layer = nn.Linear(W, 3 * W)
    place = parameter_cut(layer, Cut(name="qkv", word="column", blocks=3), "weight")
    q, k, v = layer.weight.detach().chunk(3)
    assert torch.equal(_part(layer.weight.detach(), 2, 1, place), torch.cat([q[4:], k[4:], v[4:]]))
    row = Cut(name="out", word="row")
    assert (parameter_cut(layer, row, "weight"), parameter_cut(layer, row, "bias")) == (Shard(1), Replicate())


@pytest.mark.parametrize(
    ("cuts", "coordinate", "wanted"),
    [
        (((0, 2, 3),), (1,), [(4, 4), (12, 4), (20, 4)]),  # q, k and v of the second half of the heads
        (((0, 2, 1), (0, 2, 3)), (0, 1), [(4, 4), (12, 2)]),  # of which fsdp gives the first rank six rows
        (((0, 2, 1), (0, 2, 3)), (1, 1), [(14, 2), (20, 4)]),
        (((0, 5, 1),), (4,), [(20, 4)]),  # ceil-sized, as torch cuts
        (((0, 16, 1),), (15,), [(24, 0)]),
    ],
)
def test_where_rows_lie(cuts: tuple[tuple[int, int, int], ...], coordinate: tuple[int, ...], wanted: object) -> None:
    assert _spans((24,), cuts, coordinate) == [wanted]
