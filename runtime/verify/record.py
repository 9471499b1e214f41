"""Writes down what a rank's steps gave, through the parts that the trainer is handed anyway: passes, update, metrics
and saves. The run itself computes what it would compute without it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dtrain.cluster.errors import UsageError
from dtrain.runtime.verify.records import BUFFER, GRADIENT, Group, Part, Piece, RankStep, write
from dtrain.runtime.verify.sample import inside
from dtrain.strategies.boxes import Box
from dtrain.strategies.protocol import (
    AllReduce,
    Forward,
    Lying,
    MicroBatch,
    Passed,
    Passes,
    StepOptions,
    Update,
    Wrapped,
)
from dtrain.strategies.state import DTYPES, describe

GROUP_LIMIT = 1 << 10  # elements of a tensor whose gradient is kept for each micro-batch
_STORED = 23  # mantissa bits of an fp32 number


@dataclass(slots=True)
class Recorder:
    """Of one rank. `groups`: keep each micro-batch's own share of the gradients too, which needs a model that lies
    whole on this rank. `data_rank`: whose samples it works on."""

    folder: Path
    rank: int
    world_size: int
    data_rank: int
    groups: bool = False
    _parts: list[Part] = field(default_factory=list)
    _pieces: dict[str, Piece] = field(default_factory=dict)
    _numbers: dict[str, Any] = field(default_factory=dict)
    _state: Callable[[], Iterable[tuple[str, tuple[int, ...], str, list[tuple[Box, Tensor]]]]] | None = None
    _module: nn.Module | None = None

    def attach(self, wrapped: Wrapped) -> Wrapped:
        """The same, watched. Writes down what it is before the first step."""
        self._module = wrapped.module
        self._state = lambda: _canonical(wrapped)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(0, {})
        passes = _Passes(inner=wrapped.passes, recorder=self)
        return replace(wrapped, passes=passes, update=_Update(inner=wrapped.update, wrapped=wrapped, recorder=self))

    # ---- what the trainer asks of its metrics and its saves ----

    def write(self, record: Mapping[str, Any]) -> None:
        self._numbers = {
            "loss": record.get("loss"),
            "norm": record.get("grad_norm"),
            "lr": record.get("lr"),
            "scale": record.get("loss_scale") or 1.0,
        }

    def due(self, step: int) -> bool:
        return True

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        assert self._state is not None
        assert self._module is not None
        for name, shape, dtype, boxes in self._state():
            self._pieces[name.replace(".", "/", 1)] = piece(shape, dtype, boxes)
        for name, buffer in self._module.named_buffers():
            self._pieces[f"{BUFFER}/{name}"] = _own_piece(name, buffer, self.world_size)
        numbers = {key: value for key, value in self._numbers.items() if value is not None}
        found = RankStep(step=step, rank=self.rank, parts=tuple(self._parts), pieces=self._pieces, **numbers)
        write(self.folder, found)
        self._parts, self._pieces, self._numbers = [], {}, {}

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def wait(self) -> None:
        pass

    # ---- what passes and update tell ----

    def passed(self, micro_batches: Sequence[MicroBatch], losses: Mapping[int, tuple[float, float]]) -> None:
        """`losses`: of the micro-batches, by their number."""
        for number, micro in enumerate(micro_batches):
            if micro.weight:
                total, counted = losses.get(number, (None, None))
                self._parts.append(
                    Part(
                        group=(self.data_rank, number),
                        indices=micro.indices,
                        digests=_digests(micro),
                        count=micro.count,
                        total=total,
                        counted=counted,
                    )
                )

    def gradients(self, wrapped: Wrapped) -> None:
        for name, shape, boxes in wrapped.update.gradients(wrapped.module):
            if boxes:
                self._pieces[f"{GRADIENT}/{name}"] = piece(shape, DTYPES[boxes[0][1].dtype], boxes)

    def group_gradients(self, group: Group, named: Mapping[str, Tensor]) -> None:
        for name, gradient in named.items():
            whole = _own_piece(name, gradient, 1)
            stride = max(1, -(-len(whole.numbers) // GROUP_LIMIT))
            kept = replace(whole, numbers=whole.numbers[::stride], values=whole.values[::stride])
            self._pieces[f"{group[0]}.{group[1]}/{name}"] = kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    inner: Passes
    recorder: Recorder

    def train(
        self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
    ) -> Passed:
        losses: dict[int, tuple[Tensor, float]] = {}

        def loss(output: Any, batch: Any, count: float) -> tuple[Tensor, float]:
            total, counted = options.loss(output, batch, count)
            number = next((n for n, micro in enumerate(micro_batches) if micro.batch is batch), len(losses))
            losses[number] = (total.detach(), counted)
            return total, counted

        sync = _Between(wrapped, micro_batches, self.recorder) if self.recorder.groups else wrapped.sync
        # Of one process only: a pipeline's first forward looks at shapes with random numbers of its own.
        forward = _without_chance(options.forward) if self.recorder.world_size == 1 else options.forward
        watched = replace(options, loss=loss, forward=forward)
        passed = self.inner.train(replace(wrapped, sync=sync), micro_batches, watched, divisor)
        if isinstance(sync, _Between):
            sync.close()
        self.recorder.passed(
            micro_batches, {number: (float(total), counted) for number, (total, counted) in losses.items()}
        )
        return passed

    def evaluate(self, *args: Any) -> Any:
        return self.inner.evaluate(*args)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    inner: Update
    wrapped: Wrapped
    recorder: Recorder

    def norm(self, all_reduce: AllReduce) -> float:
        self.recorder.gradients(self.wrapped)
        return self.inner.norm(all_reduce)

    def gradients(self, module: nn.Module) -> Iterable[Lying]:
        return self.inner.gradients(module)

    def apply(self, factor: float) -> None:
        self.inner.apply(factor)


class _Between:
    """A gradient sync that looks at what has been added up before each micro-batch: the differences are the shares."""

    def __init__(self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], recorder: Recorder) -> None:
        self._wrapped = wrapped
        self._sync = wrapped.sync
        self._recorder = recorder
        self._number = -1
        self._before: dict[str, Tensor] = {}

    def begin(self, *, last: bool) -> None:
        self._look()
        self._number += 1
        self._sync.begin(last=last)

    def backward(self, loss: Tensor) -> None:
        self._sync.backward(loss)

    def finish(self) -> bool:
        return self._sync.finish()

    def drop_unused(self) -> None:
        self._sync.drop_unused()

    def zero(self) -> None:
        self._sync.zero()

    def settle(self) -> None:
        self._sync.settle()

    def close(self) -> None:
        self._look()

    def _look(self) -> None:
        now = {name: gradient.double() for name, gradient in _own_gradients(self._wrapped.module)}
        if self._number >= 0:
            share = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
            self._recorder.group_gradients((0, self._number), share)
        self._before = now


def piece(shape: tuple[int, ...], dtype: str, boxes: Sequence[tuple[Box, Tensor]]) -> Piece:
    """Of the boxes that a rank holds of one tensor."""
    numbers, values, square, bits = [], [], 0.0, 0
    for box, tensor in boxes:
        where, places = inside(shape, box)
        flat = tensor.detach().reshape(-1)
        numbers.append(where)
        values.append(flat[torch.from_numpy(places).to(flat.device)].double().cpu().numpy())
        square += float(flat.double().square().sum())
        bits = max(bits, mantissa_bits(flat))
    return Piece(
        shape=shape,
        dtype=dtype,
        numbers=np.concatenate(numbers) if numbers else np.arange(0),
        values=np.concatenate(values) if values else np.zeros(0),
        square=square,
        bits=bits,
    )


def mantissa_bits(flat: Tensor) -> int:
    """The most that any of its numbers needs: 7 where fp32 holds what bf16 would hold as well."""
    if flat.dtype != torch.float32 or not flat.numel():
        return _STORED
    words = flat.contiguous().cpu().numpy().view(np.int32)
    used = int(np.bitwise_or.reduce(words)) & ((1 << _STORED) - 1)
    return _STORED + 1 - (used & -used).bit_length() if used else 0


def _own_piece(name: str, tensor: Tensor, world_size: int) -> Piece:
    spec, boxes = describe(name, tensor, world_size)
    return piece(spec.shape, spec.dtype, boxes)


def _own_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _canonical(wrapped: Wrapped) -> Iterator[tuple[str, tuple[int, ...], str, list[tuple[Box, Tensor]]]]:
    specs, local, _ = wrapped.state.canonical()
    for spec in specs:
        if spec.name in local:
            yield spec.name, spec.shape, spec.dtype, local[spec.name]


def _digests(micro: MicroBatch) -> tuple[str, ...]:
    """Of each sample that counts, over every tensor of the batch whose first dim is that of samples."""
    number = len(micro.indices)
    rows = [
        leaf.detach().cpu()
        for leaf in tree_leaves(micro.batch)
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == number
    ]
    if not rows or number != micro.weight:
        return ()
    return tuple(_digest([row[index] for row in rows]) for index in range(number))


def _digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    shapes = "x".join(",".join(map(str, tensor.shape)) for tensor in tensors)
    return f"{shapes}:{found.hexdigest()}"


def _without_chance(forward: Forward) -> Forward:
    """Raises UsageError for a forward that draws random numbers: ranks draw others than one process does."""

    def watched(model: nn.Module, batch: Any, count: float) -> Any:
        before = _chance()
        output = forward(model, batch, count)
        if not all(map(torch.equal, before, _chance())):
            raise UsageError(
                "verify: the model's forward draws random numbers (dropout in modules was set to 0 already), and ranks "
                "draw others than one process does: nothing can be compared. Switch them off, like "
                "`dtrain verify cfg.yaml model.dropout=0`"
            )
        return output

    return watched


def _chance() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]  # type: ignore[no-untyped-call]


def silence_dropout(model: nn.Module) -> int:
    """Sets every dropout rate that a module holds to 0; how many there were."""
    found = 0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            named = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if named and isinstance(value, float) and 0.0 < value <= 1.0:
                setattr(module, name, 0.0)
                found += 1
    return found
