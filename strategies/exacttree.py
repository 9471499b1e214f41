"""Logical shards of a global batch, and the one tree that everything over them is summed in. Torch-free and pure.

The tree belongs to the number of shards alone: its leaves are the shards in order, every node is the sum of its two
halves. A rank sums what lies whole among its own shards; whoever gets those sums from all ranks does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Node = tuple[int, int]  # the shards below it: begin .. end
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalShards:
    """`num` parts of every global batch, dealt to `world_size` ranks in order; numbers differ by at most one."""

    num: int
    rank: int
    world_size: int

    @property
    def mine(self) -> range:
        return self.of(self.rank)

    @property
    def most(self) -> int:
        """Of one rank: so many each goes through in a step, the last ones without counting where it has fewer."""
        return -(-self.num // self.world_size)

    def of(self, rank: int) -> range:
        return range(rank * self.num // self.world_size, (rank + 1) * self.num // self.world_size)

    def sums_of(self, rank: int) -> list[Node]:
        """The nodes whose sums a rank has when it is through its shards, in order."""
        return whole_nodes((0, self.num), self.of(rank))

    def by_shard(self, values: Sequence[float]) -> list[float]:
        """What this rank adds to a sum over ranks so that everybody gets each shard's own: its values, one a
        micro-batch, summed by shard, and 0 for the shards of others."""
        parts = len(values) // self.most
        found = [0.0] * self.num
        for turn, shard in enumerate(self.mine):
            for value in values[turn * parts : (turn + 1) * parts]:
                found[shard] += value
        return found


def halves(node: Node) -> tuple[Node, Node]:
    begin, end = node
    middle = (begin + end) // 2
    return (begin, middle), (middle, end)


def whole_nodes(node: Node, shards: range) -> list[Node]:
    """The largest nodes below `node` that lie in `shards`, in order."""
    begin, end = node
    if shards.start <= begin and end <= shards.stop:
        return [node]
    if end - begin == 1 or end <= shards.start or shards.stop <= begin:
        return []
    return [found for half in halves(node) for found in whole_nodes(half, shards)]


def fold(node: Node, known: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
    """The sum of a node from those of nodes that cover it."""
    if node in known:
        return known[node]
    left, right = halves(node)
    return add(fold(left, known, add), fold(right, known, add))


class GrowingSums:
    """The tree's sums over shards that come one after another: only whole nodes that wait for another are kept, at most
    one a level."""

    def __init__(self, num: int) -> None:
        self._parents = {halves(node): node for node in _inner((0, num))}

    def add_to(self, sums: list[tuple[Node, T]], shard: int, value: T, add: Callable[[T, T], T]) -> None:
        """Changes `sums`, which are in order; `shard` is the one after them."""
        node = (shard, shard + 1)
        while sums and (parent := self._parents.get((sums[-1][0], node))):
            value = add(sums.pop()[1], value)
            node = parent
        sums.append((node, value))


def _inner(node: Node) -> list[Node]:
    if node[1] - node[0] == 1:
        return []
    left, right = halves(node)
    return [node, *_inner(left), *_inner(right)]
