"""Which modules of a model are cut over the tensor ranks, and how: from `strategy.tensor_plan`, from the plan that a
Hugging Face model brings, or from the shapes of its layers. Decides only; tensorcuts.py cuts.

A plan can't make results wrong, only slow: cut tensors keep their global shape and meaning (torch's DTensor).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.config import TENSOR_WORD

KEY = "strategy.tensor_plan"

# What Hugging Face's words mean here.
_FOREIGN_WORDS = {
    "colwise": "column",
    "colwise_rep": "head",
    "colwise_gather_output": "head",
    "rowwise": "row",
    "embedding_rowwise": "embedding",
    "replicate": "whole",
    "replicated_with_grad_allreduce": "whole",
}

# Names under which attention modules, and Hugging Face's configs, keep how many heads they have.
_QUERY_HEADS = ("heads", "num_heads", "n_heads", "n_head", "nheads", "num_attention_heads")
_HEADS = (*_QUERY_HEADS, "num_key_value_heads", "n_kv_heads", "num_kv_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One module. column: by outputs; row: by inputs; embedding: by entries; head: by outputs, which all
    ranks get. `blocks`: so many matrices lie in one
    (q, k and v: 3), each of which is cut for itself."""

    name: str
    word: str
    blocks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    cuts: tuple[Cut, ...]
    origin: str  # in words: "by strategy.tensor_plan"


def tensor_plan(model: nn.Module, given: Mapping[str, str], degree: int) -> Plan:
    """Raises UsageError where no plan is found, or one does not fit the model or the degree."""
    own = {str(pattern): str(word) for pattern, word in (getattr(model, "tp_plan", None) or {}).items()}
    if given:
        plan = Plan(cuts=tuple(_from_patterns(model, given)), origin=f"by {KEY}")
    elif own:
        plan = Plan(cuts=tuple(_from_patterns(model, _translated(model, own))), origin="by the model's own plan")
    else:
        plan = Plan(cuts=tuple(_derived(model)), origin="by the shapes of its layers")
    if not any(cut.word != "whole" for cut in plan.cuts):
        raise UsageError(
            f"strategy: tensor {degree} cuts nothing of this model: "
            + ("its plan names no module to cut" if given or own else "no attention or MLP was found by its layers")
            + f". Say in {KEY} what to cut, like {{'*.up': column, '*.down': row}}, or set tensor: 1"
        )
    _check(model, plan, degree)
    return plan


def describe(plan: Plan, degree: int, *, sequence: bool) -> str:
    """One line for a person."""
    number = sum(cut.word != "whole" for cut in plan.cuts)
    rest = ", sequences between them" if sequence else ""
    return f"tensor {degree}: {number} modules cut {plan.origin}{rest}"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_dims(module: nn.Module) -> tuple[int, int]:
    """(dim of the outputs, dim of the inputs) of a linear module's weight."""
    return (1, 0) if is_conv1d(module) else (0, 1)


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _translated(model: nn.Module, own: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted({word for word in own.values() if word not in _FOREIGN_WORDS})
    if unknown:
        raise UsageError(
            f"strategy: the tensor plan that {type(model).__name__} brings uses {', '.join(unknown)}, which is not "
            f"supported here. Say in {KEY} what to cut"
        )
    return {pattern: _FOREIGN_WORDS[word] for pattern, word in own.items()}


def _from_patterns(model: nn.Module, given: Mapping[str, str]) -> Iterator[Cut]:
    """The first pattern that fits a name counts; `*` stands for any part of it."""
    names = {name: module for name, module in model.named_modules() if name}
    left = dict.fromkeys(given)
    for name, module in names.items():
        for pattern, word in given.items():
            if fnmatch.fnmatchcase(name, pattern):
                left.pop(pattern, None)
                yield _cut(name, module, pattern, word)
                break
    for pattern in left:
        raise UsageError(f"{KEY}: {pattern!r} matches no module that is left. There are: {_some(names)}")


def _cut(name: str, module: nn.Module, pattern: str, word: str) -> Cut:
    """Raises UsageError for a module that can't be cut in this way."""
    match = TENSOR_WORD.fullmatch(word)
    assert match is not None  # the config's own check
    kind, blocks = match["word"], int(match["blocks"] or 1)
    wanted = "an embedding" if kind == "embedding" else "a linear layer"
    fits = isinstance(module, nn.Embedding) if kind == "embedding" else kind == "whole" or is_linear(module)
    if not fits:
        raise UsageError(f"{KEY}: {pattern!r}: {word} is for {wanted}, and {name} is a {type(module).__name__}")
    if kind == "embedding" and not _is_plain(module):
        raise UsageError(
            f"{KEY}: {name} is an embedding with max_norm, scale_grad_by_freq or sparse, which looks at all of its "
            "entries. Say whole"
        )
    return Cut(name=name, word=kind, blocks=blocks)


def _is_plain(embedding: nn.Module) -> bool:
    others = (getattr(embedding, "max_norm", None), getattr(embedding, "scale_grad_by_freq", False))
    return not any(others) and not getattr(embedding, "sparse", False)


def _derived(model: nn.Module) -> Iterator[Cut]:
    """Blocks first, each one's linear layers as registered; then what reads and writes the vocabulary."""
    taken: set[nn.Module] = set()
    for prefix, block in _blocks(model):
        linears = [(f"{prefix}.{name}", m) for name, m in block.named_modules() if name and is_linear(m)]
        taken.update(block.modules())
        yield from _pairs(linears)
    rest = [(name, module) for name, module in model.named_modules() if module not in taken]
    yield from _vocabulary(rest)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The items of every outermost list that have linear layers in them: a transformer's blocks."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(module, nn.ModuleList | nn.Sequential) and not is_linear(child):
                yield prefix + name, child
            else:
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(model, ""))


def _pairs(linears: Sequence[tuple[str, nn.Module]]) -> Iterator[Cut]:
    """The first pattern of shapes that fits, again and again; a layer that is part of none stays whole."""
    at = 0
    while at < len(linears):
        shapes = [_in_and_out(module) for _, module in linears[at : at + 4]]
        words = next(
            (words for words, fits in _PATTERNS if len(shapes) >= len(words) and fits(*shapes[: len(words)])), ()
        )
        for (name, _), word in zip(linears[at:], words, strict=False):
            kind, _, blocks = word.partition(" ")
            yield Cut(name=name, word=kind, blocks=int(blocks or 1))
        at += len(words) or 1


Shape = tuple[int, int]  # (inputs, outputs)


def _in_and_out(module: nn.Module) -> Shape:
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight_dims(module)
    return weight.shape[inputs], weight.shape[outputs]


def _back(first: Shape, last: Shape) -> bool:
    """Whether `last` goes back to the width that `first` came from."""
    return last[1] == first[0]


_PATTERNS = (
    # q, k, v in one; out
    (("column 3", "row"), lambda a, b: a[1] == 3 * b[0] and a[0] == b[0] and _back(a, b)),
    # gate, down, up
    (("column", "row", "column"), lambda a, b, c: a == c and a[1] == b[0] != a[0] and _back(a, b)),
    # q, k, v (fewer heads, maybe); out
    (
        ("column", "column", "column", "row"),
        lambda a, b, c, d: a[0] == b[0] == c[0] and b[1] == c[1] <= a[1] == d[0] and _back(a, d),
    ),
    # gate, up, down
    (("column", "column", "row"), lambda a, b, c: a == b and a[1] == c[0] != a[0] and _back(a, c)),
    # up, down
    (("column", "row"), lambda a, b: a[1] == b[0] and _back(a, b)),
    # gate and up in one; down
    (("column 2", "row"), lambda a, b: a[1] == 2 * b[0] and _back(a, b)),
)


def _vocabulary(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[Cut]:
    """The largest embedding, and the linear layer that is as large or has its weight."""
    embeddings = [(name, m) for name, m in modules if isinstance(m, nn.Embedding) and _is_plain(m)]
    if not embeddings:
        return
    name, largest = max(embeddings, key=lambda item: item[1].num_embeddings)
    yield Cut(name=name, word="embedding")
    for name, module in modules:
        if isinstance(module, nn.Linear) and _in_and_out(module) == (largest.embedding_dim, largest.num_embeddings):
            yield Cut(name=name, word="head")


def _check(model: nn.Module, plan: Plan, degree: int) -> None:
    """Raises UsageError for sizes and heads that the degree does not divide, and for layers that can't be cut."""
    for name, module in model.named_modules():
        inside = any(cut.word in ("column", "row") and cut.name.startswith(f"{name}.") for cut in plan.cuts)
        if not inside or not name:
            continue
        for owner, key in product((module, getattr(module, "config", None)), _HEADS):
            heads = getattr(owner, key, None)
            if isinstance(heads, int) and heads % degree:
                raise UsageError(
                    f"strategy: tensor {degree} does not divide the {heads} heads of {name} ({key}). Set tensor to a "
                    f"divisor of {heads}"
                )
    for cut in plan.cuts:
        if cut.word in ("column", "row"):
            _check_size(cut, model.get_submodule(cut.name), degree)


def _check_size(cut: Cut, module: nn.Module, degree: int) -> None:
    inputs, outputs = _in_and_out(module)
    size, what = (inputs, "inputs") if cut.word == "row" else (outputs, "outputs")
    if size % (cut.blocks * degree):
        blocks = f"{cut.blocks} blocks x " if cut.blocks > 1 else ""
        raise UsageError(
            f"strategy: {cut.name} has {size} {what}, which {blocks}tensor {degree} does not divide. Choose another "
            f"degree, or say whole for it in {KEY}"
        )


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:20])
