"""Whether an optimizer's update of one element depends on that element alone: then its parameters may be cut, or lined
up in one tensor, and the numbers stay what they are."""

from __future__ import annotations

import torch

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
