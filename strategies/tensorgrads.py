"""Gradients of parameters that are cut over tensor ranks, or whole on each of them, as local tensors: what a sum over
the copies of a model works with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from dtrain.strategies.placement import local_part


def own_part(parameter: Tensor) -> Tensor:
    """What this rank holds of it."""
    return local_part(parameter).detach()


def part_of_gradient(gradient: DTensor, parameter: Tensor) -> tuple[Tensor, bool]:
    """(this rank's part, where the parameter lies; whether it is a summand that the other tensor ranks have to add to).
    Collective among the tensor ranks where it lies elsewhere."""
    assert isinstance(parameter, DTensor)
    if gradient.placements != parameter.placements and not _is_partial(gradient):
        gradient = gradient.redistribute(placements=parameter.placements)
    if _is_partial(gradient) and not all(place.is_replicate() for place in parameter.placements):
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local(), _is_partial(gradient)


def as_gradient(local: Tensor, parameter: Tensor, *, partial: bool = False) -> Tensor:
    """The other way: a view of `local` that fits `.grad`."""
    if not isinstance(parameter, DTensor):
        return local
    places = (Partial(),) if partial else parameter.placements
    return DTensor.from_local(
        local, parameter.device_mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def sum_over_tensor(parameters: Sequence[nn.Parameter], summands: Sequence[Tensor]) -> None:
    """In place, in one message. Collective among the tensor ranks."""
    (parameter, *_) = parameters
    assert isinstance(parameter, DTensor)
    flat = torch.cat([summand.reshape(-1) for summand in summands])
    dist.all_reduce(flat, group=parameter.device_mesh.get_group())
    for summand, total in zip(summands, torch.split(flat, [s.numel() for s in summands]), strict=True):
        summand.copy_(total.view_as(summand))


class OneCopy:
    """How gradients meet (protocol.GradientSync) where the tensor ranks are all there are: each keeps what autograd has
    given, but for parameters of which every one of them has a summand."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def begin(self, *, last: bool) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        summands: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in self._parameters:
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
                local, is_partial = part_of_gradient(gradient, parameter)
                parameter.grad = as_gradient(local, parameter)
                if is_partial:
                    summands[local.dtype].append((parameter, local))
        for alike in summands.values():
            sum_over_tensor([parameter for parameter, _ in alike], [local for _, local in alike])
        return False

    def drop_unused(self) -> None:
        pass

    def settle(self) -> None:
        pass


def _is_partial(gradient: DTensor) -> bool:
    return any(place.is_partial() for place in gradient.placements)
