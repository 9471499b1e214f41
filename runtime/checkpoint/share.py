"""Loading where ranks hold the same tensors: each byte leaves the store once, and goes to the others from rank to rank.

What is dealt out to whom is what a save would deal: a pure function of the specs. Reading and verifying is loader.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.cluster.errors import CorruptCheckpoint
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.loader import Request, load_tensors
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.plan import manifest_tensors
from dtrain.runtime.checkpoint.ranges import pieces
from dtrain.strategies.boxes import Box, TensorSpec, whole

EXCHANGE_BYTES = 64 << 20  # what one exchange brings to a rank, all ranks' parts together
MIN_PART_BYTES = 256 << 10
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a replicated tensor, and where it lies in its reader's part of an exchange."""

    name: str
    box: Box
    begin: int
    end: int


def load_shared(
    storage: Storage,
    manifest: Manifest,
    specs: Sequence[TensorSpec],
    requests: Iterable[Request],
    *,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """load_tensors() for all ranks together, as fill_shared() does it."""

    def read(wanted: Sequence[Request]) -> None:
        load_tensors(storage, manifest, wanted)

    fill_shared(read, specs, requests, rank=rank, world_size=world_size, group=group)


def fill_shared(
    read: Callable[[Sequence[Request]], None],
    specs: Sequence[TensorSpec],
    requests: Iterable[Request],
    *,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fills what is requested: `specs` describe what the ranks hold, equal on every rank; `requests` are this rank's
    own, where whatever all ranks hold is asked for as a whole. Collective, over CPU memory;
    `group` None: the default process group.

    Raises CorruptCheckpoint on every rank, whoever of them read the damaged bytes.
    """
    everybody = tuple(range(world_size))
    common = {spec.name: spec for spec in specs if spec.layout.holders == everybody} if world_size > 1 else {}
    wanted = list(requests)
    targets = {name: target for name, _, target in wanted if name in common}
    own = [request for request in wanted if request[0] not in common]
    exchanges = _plan(list(common.values()), world_size)
    for exchange in exchanges:
        for piece in exchange[rank]:
            target = targets[piece.name]
            own.append((piece.name, piece.box, target[piece.box.relative_to(whole(tuple(target.shape)))]))
    damage: CorruptCheckpoint | None = None
    try:
        read(own)
    except CorruptCheckpoint as error:
        damage = error
    if world_size > 1:
        _raise_together(damage, world_size, group)
    elif damage is not None:
        raise damage
    for exchange in exchanges:
        _exchange(exchange, targets, rank, group)


def _plan(specs: Sequence[TensorSpec], world_size: int) -> list[list[list[_Piece]]]:
    """For each exchange and each rank: what the rank brings to it, having read it."""
    limit = max(MIN_PART_BYTES, EXCHANGE_BYTES // max(1, world_size))
    filled: list[list[list[_Piece]]] = [[[]] for _ in range(world_size)]  # rank -> exchange -> pieces
    for name, info in manifest_tensors(specs, world_size).items():
        item = item_bytes(info.dtype)
        for reader, stored in info.stored_boxes(whole(info.shape)):
            for box in pieces(stored, stored, item, limit):
                size = box.num_elements * item
                parts = filled[reader]
                begin = _aligned(parts[-1][-1].end) if parts[-1] else 0
                if parts[-1] and begin + size > limit:
                    parts.append([])
                    begin = 0
                parts[-1].append(_Piece(name, box, begin, begin + size))
    num_exchanges = max(map(len, filled), default=0)
    return [[parts[number] if number < len(parts) else [] for parts in filled] for number in range(num_exchanges)]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _exchange(
    exchange: Sequence[Sequence[_Piece]], targets: dict[str, Tensor], rank: int, group: dist.ProcessGroup | None
) -> None:
    """Every rank's pieces come into every rank's tensors."""
    size = _aligned(max((brought[-1].end for brought in exchange if brought), default=0))
    if not size:
        return
    everything = torch.empty(len(exchange) * size, dtype=torch.uint8)
    parts = everything.view(len(exchange), size)
    for target, part in _places(exchange[rank], targets, parts[rank]):
        part.copy_(target)
    dist.all_gather_single(everything, parts[rank].clone(), group=group)
    for reader, brought in enumerate(exchange):
        if reader != rank:
            for target, part in _places(brought, targets, parts[reader]):
                target.copy_(part)


def _places(brought: Sequence[_Piece], targets: dict[str, Tensor], part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(the piece in its tensor, the piece in the exchange), both as views of one shape."""
    for piece in brought:
        target = targets[piece.name].detach()
        inside = target[piece.box.relative_to(whole(tuple(target.shape)))]
        yield inside, part[piece.begin : piece.end].view(target.dtype).view(inside.shape)


def _raise_together(damage: CorruptCheckpoint | None, world_size: int, group: dist.ProcessGroup | None) -> None:
    said = None if damage is None else (str(damage), damage.step, damage.attempt, damage.file, damage.tensor)
    everybody: list[tuple[str, int, int, str, str] | None] = [None] * world_size
    dist.all_gather_object(everybody, said, group=group)
    if damage is not None:
        raise damage
    for found in everybody:
        if found is not None:
            message, step, attempt, file, tensor = found
            raise CorruptCheckpoint(message, step=step, attempt=attempt, file=file, tensor=tensor)
