"""How the ranks' sums of a bucket of gradients meet, in one fixed order: every rank gets all sums of a piece of it and
adds them up in the tree's order, so it does not matter who had which shards. The bytes are those of a reduce-scatter
(and, where parameters are not cut, of the all-gather that makes it an all-reduce).

Pieces: the rows of a parameter are cut over the `shard` axis as FSDP cuts them; all that a rank holds of a bucket is
cut in equal pieces over the `replicate` axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.strategies.boxes import grid_boxes
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.exacttree import LogicalShards, Node, fold

Range = tuple[int, int]  # of a tensor's elements in memory: begin .. end


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """`everybody` and `copies` are groups of this exchange alone: what else goes on meanwhile can't come in between."""

    everybody: dist.ProcessGroup
    copies: dist.ProcessGroup | None  # the ranks that hold the same part of the model; None: no other does


def make_groups(degrees: Degrees, rank: int) -> Groups:
    """Collective."""
    everybody = dist.new_group(list(range(degrees.world_size)))
    if degrees.replicate == 1:
        return Groups(everybody=everybody, copies=None)
    members = {degrees.peers(r, ("replicate",)) for r in range(degrees.world_size)}
    made = {ranks: dist.new_group(list(ranks)) for ranks in sorted(members)}
    return Groups(everybody=everybody, copies=made[degrees.peers(rank, ("replicate",))])


def row_ranges(shape: Sequence[int], num: int) -> list[Range]:
    """The elements of each of `num` parts of a contiguous tensor's rows, as torch.chunk and FSDP cut them."""
    if num == 1:
        return [(0, torch.Size(shape).numel())]
    row = torch.Size(shape[1:]).numel()
    boxes = grid_boxes(tuple(shape), (num, *(1 for _ in shape[1:])))
    return [(box.offsets[0] * row, (box.offsets[0] + box.shape[0]) * row) for box in boxes]


class Exchange:
    """Of one bucket. `start` sends this rank's sums, `fold` adds up what came, `finish` gives each parameter's part
    that this rank holds, flat. Buffers are kept from step to step."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], shards: LogicalShards, degrees: Degrees, groups: Groups
    ) -> None:
        self._groups = groups
        self._shards = shards
        self._sums = shards.sums_of(shards.rank)
        first = parameters[0]
        ranges = [row_ranges(p.shape, degrees.shard) for p in parameters]
        held = [[of_parameter[part] for of_parameter in ranges] for part in range(degrees.shard)]  # by shard rank
        lengths = [sum(end - begin for begin, end in part) for part in held]
        pieces = [-(-length // degrees.replicate) for length in lengths]
        places = [degrees.coordinate(rank) for rank in range(degrees.world_size)]
        mine = places[shards.rank]["shard"]

        def buffer(size: int) -> Tensor:
            return torch.zeros(size, dtype=first.dtype, device=first.device)

        self._piece = pieces[mine]
        self._send_sizes = [len(self._sums) * pieces[place["shard"]] for place in places]
        self._sent = buffer(sum(self._send_sizes))
        self._copies: list[list[tuple[int, Range, Tensor]]] = [[] for _ in self._sums]  # (parameter, its part, place)
        at = 0
        for place in places:
            size, begin = pieces[place["shard"]], place["replicate"] * pieces[place["shard"]]
            for copies in self._copies:
                for index, (first_element, last), offset in _overlaps(held[place["shard"]], (begin, begin + size)):
                    view = self._sent[at + offset : at + offset + last - first_element]
                    copies.append((index, (first_element, last), view))
                at += size
        nodes = [shards.sums_of(rank) for rank in range(degrees.world_size)]
        self._receive_sizes = [len(of_rank) * self._piece for of_rank in nodes]
        self._received = buffer(sum(self._receive_sizes))
        parts = torch.split(self._received, self._piece) if self._piece else ()
        self._known: dict[Node, Tensor] = dict(zip([n for of_rank in nodes for n in of_rank], parts, strict=False))
        self._whole = buffer(self._piece * degrees.replicate if groups.copies else 0)
        self._held_sizes = [end - begin for begin, end in held[mine]]
        self._work: dist.Work | None = None
        self._result = self._whole

    def start(self, sums: Sequence[Sequence[Tensor | None]]) -> None:
        """`sums`: of each node that this rank has, a flat gradient a parameter; None is a gradient of zeros."""
        for copies, gradients in zip(self._copies, sums, strict=True):
            to, what = [], []
            for index, (begin, end), place in copies:
                gradient = gradients[index]
                if gradient is None:
                    place.zero_()
                else:
                    to.append(place)
                    what.append(gradient[begin:end])
            if to:
                torch._foreach_copy_(to, what)
        self._work = dist.all_to_all_single(
            self._received,
            self._sent,
            self._receive_sizes,
            self._send_sizes,
            group=self._groups.everybody,
            async_op=True,
        )

    def fold(self) -> None:
        self._wait()
        if not self._piece:  # fewer rows than ranks, and none of them is here
            return
        self._result = fold((0, self._shards.num), self._known, lambda a, b: a.add_(b))
        if self._groups.copies is not None:
            places = list(torch.split(self._whole, self._piece))
            self._work = dist.all_gather(places, self._result, group=self._groups.copies, async_op=True)
            self._result = self._whole

    def finish(self) -> list[Tensor]:
        self._wait()
        return list(torch.split(self._result[: sum(self._held_sizes)], self._held_sizes))

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def _overlaps(parts: Sequence[Range], wanted: Range) -> list[tuple[int, Range, int]]:
    """Of parts that lie one after another, those elements that fall into `wanted`: (number, its elements, offset from
    the beginning of `wanted`)."""
    found = []
    at = 0
    for index, (begin, end) in enumerate(parts):
        low, high = max(at, wanted[0]), min(at + end - begin, wanted[1])
        if low < high:
            found.append((index, (begin + low - at, begin + high - at), low - wanted[0]))
        at += end - begin
    return found
