"""Whether an optimizer's update of one element depends on that element alone: then its parameters may be cut, or lined
up in one tensor, and the numbers stay what they are."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Of torch's own. A class of another library that has the name of one that is not is taken for one that is not, too.
_KNOWN = {
    **dict.fromkeys(("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD"), True),
    **dict.fromkeys(("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"), True),
    **dict.fromkeys(("LBFGS", "Adafactor", "Muon"), False),
}


def is_elementwise(optimizer: object) -> bool | None:
    """`optimizer`: a class, or a function that makes one. None: it is not known; a subclass of one of torch's may do
    anything. Who has written one says so by an attribute `elementwise`."""
    said = getattr(optimizer, "elementwise", None)
    if said is not None:
        return bool(said)
    name = getattr(optimizer, "__name__", "")
    known = _KNOWN.get(name)
    return None if known and optimizer is not getattr(torch.optim, name) else known


def differs_on_parts(optimizer: torch.optim.Optimizer) -> bool:
    """Whether some steps of an optimizer that is not known make something else of each half of a small tensor alone,
    laid out flat, than of the whole: it has norms or factors of whole tensors, or sums over all of them. False where it
    can't be tried so. The optimizer is as before."""
    before = dict(vars(optimizer))
    try:
        with torch.random.fork_rng(devices=[]):
            whole = _tried(optimizer, before, slice(None), (4, 4))
            halves = [_tried(optimizer, before, half, (8,)) for half in (slice(8), slice(8, None))]
    except Exception:  # whatever the user's class wants of its parameters
        return False
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(before)
    return not torch.allclose(whole, torch.cat(halves, dim=1), rtol=1e-4, atol=1e-7, equal_nan=True)


def _tried(optimizer: torch.optim.Optimizer, before: dict[str, Any], part: slice, shape: tuple[int, ...]) -> Tensor:
    """(groups, numbers): what three steps with each group's settings make of this part of 16 numbers, in that shape."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 16, generator=generator) * torch.logspace(-1, 1, 16))[:, part]
    groups = [{**group, "params": [nn.Parameter(start.reshape(shape).clone())]} for group in before["param_groups"]]
    optimizer.param_groups, optimizer.state = groups, defaultdict(dict)
    torch.manual_seed(0)
    for gradient in gradients:
        for group in groups:
            group["params"][0].grad = gradient.reshape(shape).clone()
        optimizer.step()
    return torch.stack([group["params"][0].detach().reshape(-1) for group in groups])
