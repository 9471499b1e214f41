"""How gradients meet under ZeRO, and the update of its partitions: DeepSpeed reduces, partitions and gathers; in which
order, and what becomes of parameters without a gradient, is decided here. The step as a whole is step.py's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.protocol import Lying
from dtrain.strategies.zero_engine import Carrier, Engine
from dtrain.strategies.zero_joined import JoinedStep
from dtrain.strategies.zero_partitions import Slice, boxes_of


class FixedOrder:
    """Hands parameters with a gradient on to DeepSpeed in one order, the same on every rank and in every run: the last
    registered first, as backward reaches them. DeepSpeed itself takes them as they come, so that ranks whose samples
    use different parameters would add one's gradient to another's. What comes early waits; what never comes is zeros.
    """

    def __init__(self, trained: Sequence[tuple[nn.Parameter, tuple[int, ...]]], reduce: Callable[..., None]) -> None:
        """`trained`: parameters in the model's order, each with what `reduce` wants besides it."""
        self._order = tuple(reversed(trained))
        self._index = {id(parameter): index for index, (parameter, _) in enumerate(self._order)}
        self._reduce = reduce
        self._ready = [False] * len(self._order)
        self._next = 0

    def take(self, parameter: nn.Parameter, *_: int) -> None:
        """The parameter has a gradient."""
        self._ready[self._index[id(parameter)]] = True
        self._advance()

    def finish(self) -> None:
        """Backward is over: zeros for the others."""
        for index in range(self._next, len(self._order)):
            if not self._ready[index]:
                fill_with_zeros(self._order[index][0])
                self._ready[index] = True
        self._advance()
        self._ready = [False] * len(self._order)
        self._next = 0

    def _advance(self) -> None:
        while self._next < len(self._order) and self._ready[self._next]:
            parameter, more = self._order[self._next]
            self._reduce(parameter, *more)
            self._next += 1


def fill_with_zeros(parameter: nn.Parameter) -> None:
    """A gradient of the whole parameter's shape, also where the parameter itself is not here (stage 3): torch compares
    the two when it is assigned."""
    held = parameter.data
    parameter.data = torch.zeros(getattr(parameter, "ds_shape", held.shape), dtype=held.dtype, device=held.device)
    parameter.grad = parameter.data
    parameter.data = held


class SameModules:
    """Stage 3 gathers a module's parameters when it runs, on all ranks together. Where ranks' samples take different
    ways through the model, one module's would go into another's: so what they ran is summed up, and compared."""

    def __init__(self, model: nn.Module) -> None:
        self._digest = 0
        for number, module in enumerate(model.modules(), start=1):
            if any(not getattr(p, "ds_persist", False) for p in module.parameters(recurse=False)):
                module.register_forward_pre_hook(partial(self._ran, number))

    def take(self) -> list[float]:
        """What this rank ran since the last time: to be summed over all ranks, and given to compare()."""
        mine, self._digest = float(self._digest), 0
        return [mine, mine * mine, 1.0]

    def compare(self, sums: Sequence[float]) -> None:
        """Raises UsageError, on every rank together."""
        total, squares, ranks = sums
        if squares * ranks != total * total:  # whole numbers, exact: these are equal only where all ranks' are
            raise UsageError(
                "strategy: zero3 gathers the parameters of a module when it runs, which all ranks must do in the same "
                "order, but their samples took different ways through the model. Take zero2, or fsdp"
            )

    def _ran(self, number: int, *_: object) -> None:
        self._digest = (self._digest * _FACTOR + number) % _LIMIT


_FACTOR, _LIMIT = 31, 1 << 20


class ZeroGradients:
    """Sums over the ranks, in partitions: with the last micro-batch (stage 1) or with each (2 and 3)."""

    def __init__(self, engine: Engine, stage: int, slices: Sequence[Slice]) -> None:
        self.unused: frozenset[nn.Parameter] = frozenset()  # that no rank has a gradient for
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = stage
        self._trained = [one.parameter for one in slices if one.flat is not None]
        self._produced: set[nn.Parameter] = set()  # that this rank has a gradient for
        self._last = False
        self.modules = SameModules(engine.module) if stage == 3 else None
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._produced.add)  # type: ignore[no-untyped-call]
        if stage > 1:
            self._order = FixedOrder(list(self._with_groups()), self._zero.reduce_ready_partitions_and_remove_grads)
            self._zero.reduce_ready_partitions_and_remove_grads = self._order.take

    def zero(self) -> None:
        self.unused = frozenset()
        self._produced.clear()
        self._zero.zero_grad(set_to_none=True)
        if self._stage < 3:
            self._zero.micro_step_id = -1  # as its step() leaves it: one that was skipped has not come so far
            for sums in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                sums.update(dict.fromkeys(sums))

    def begin(self, *, last: bool) -> None:
        self._last = last
        self._zero.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._stage > 1:
            self._zero_setup()
            self._order.finish()
        elif self._last:
            for parameter in self._trained:
                if parameter.grad is None:
                    fill_with_zeros(parameter)
        self._engine.allreduce_gradients()

    def finish(self) -> bool:
        return len(self._produced) < len(self._trained)

    def drop_unused(self) -> None:
        produced = torch.tensor([parameter in self._produced for parameter in self._trained], dtype=torch.int32)
        dist.all_reduce(produced)
        ranks = zip(self._trained, produced.tolist(), strict=True)
        self.unused = frozenset(parameter for parameter, number in ranks if not number)

    def settle(self) -> None:
        """Parameters are let go after each module's forward anyway."""
        if self.modules:
            sums = torch.tensor(self.modules.take(), dtype=torch.float64)
            dist.all_reduce(sums)
            self.modules.compare(sums.tolist())

    def _zero_setup(self) -> None:
        """DeepSpeed makes its buckets with the first gradient of a backward; there may have been none here."""
        if self._stage == 2:
            self._zero.setup_buckets()

    def _with_groups(self) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
        """Stage 2 wants the optimizer group of each."""
        groups = {p: (i,) for i, ps in enumerate(getattr(self._zero, "bit16_groups", ())) for p in ps}
        for parameter in self._trained:
            yield parameter, groups.get(parameter, ())


class ZeroUpdate:
    """The user's optimizer on this rank's elements, in DeepSpeed's own step: that spreads the new parameters."""

    def __init__(
        self,
        engine: Engine,
        stage: int,
        carrier: Carrier,
        optimizer: torch.optim.Optimizer,
        slices: Sequence[Slice],
        gradients: ZeroGradients,
        *,
        offload: bool,
    ) -> None:
        self._engine = engine
        self._gradients = gradients
        self._offload = offload
        self._stage = stage
        self._flats: dict[int, list[Slice]] = defaultdict(list)
        for one in slices:
            if one.flat is not None:
                self._flats[id(one.flat)].append(one)
        flats = {id(one.flat): one.flat for one in slices if one.flat is not None}
        self._joined = {key: JoinedStep(optimizer, flats[key], held) for key, held in self._flats.items()}
        # Stage 3 knows no sums, only means over the ranks.
        self._scale = float(dist.get_world_size()) if stage == 3 else 1.0
        self._factor = 1.0
        carrier.on_flat = self._step_flat

    def norm(self, all_reduce: Callable[[list[float]], list[float]]) -> float:
        """2-norm of the summed gradients: each element lies in one partition, padding is zeros."""
        local = float(torch.nn.utils.get_total_norm(self._partitions())) * self._scale
        modules = self._gradients.modules
        square, *ran = all_reduce([local * local, *(modules.take() if modules else ())])
        if modules:
            modules.compare(ran)
        return math.sqrt(square)

    def gradients(self, module: nn.Module) -> Iterator[Lying]:
        flats = {} if self._offload else self._flat_gradients()
        for one in (one for slices in self._flats.values() for one in slices):
            if one.parameter not in self._gradients.unused:
                flat = flats.get(id(one.flat))
                mine = one.gradient if flat is None else flat.narrow(0, one.offset, one.mine.numel())
                yield one.name, one.shape, boxes_of(mine * self._scale, one)

    def apply(self, factor: float) -> None:
        self._factor = factor * self._scale
        self._engine.step()

    def _partitions(self) -> list[Tensor]:
        if self._offload:  # they have been copied to where the optimizer works
            return [one.gradient for slices in self._flats.values() for one in slices]
        return [part for parts in self._engine.optimizer.averaged_gradients.values() for part in parts]

    def _flat_gradients(self) -> dict[int, Tensor]:
        """By the id of the partition that they belong to, and laid out as it is."""
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        return {
            id(flat): torch.cat([part.reshape(-1) for part in zero.averaged_gradients[number]])
            for number, flat in enumerate(flats)
            if id(flat) in self._flats
        }

    def _step_flat(self, flat: Tensor) -> None:
        assert flat.grad is not None
        if self._factor != 1.0:
            flat.grad.mul_(self._factor)
        self._joined[id(flat)].step(flat.grad, self._gradients.unused)
