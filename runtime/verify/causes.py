"""From a difference in data, weights, loss or buffers to the mistake behind it: each is tried on the numbers.

Every function returns the Finding for a difference that compare.py has established. What happens to gradients is
gradientcauses.py's. Pure, torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dtrain.runtime.verify.numbers import by_rank, gap, same
from dtrain.runtime.verify.records import MODEL, Part, Step, Tensor
from dtrain.runtime.verify.verdict import Cause, Finding
from dtrain.runtime.verify.words import close, sizes, some

_LOW = {"BF16", "F16"}
_ROUNDED_BITS, _FULL_BITS = 10, 12  # what fp16 keeps; what a tensor of fp32 numbers surely has more than
DIVIDED = (
    "Means of ranks or micro-batches that hold unequal counts must not be averaged. Sum the losses and divide once, by "
    "the count of the global batch."
)


# ---- data ----


def other_samples(step: int, ranks: Step, found: Counter[int], wanted: Counter[int]) -> Finding:
    missing, added = wanted - found, found - wanted
    twice = sorted(index for index, times in found.items() if times > wanted[index] >= 1)
    lines = [
        f"{sum(found.values())} samples were read, {sum(wanted.values())} by one process",
        f"not read: {some(sorted(missing.elements()))}",
        f"read instead: {some(sorted(added.elements()))}",
    ]
    if twice:
        lines.append(f"read more than once: {some(twice)}")
    return Finding(
        cause=Cause.ORDER,
        step=step,
        quantity="samples",
        tensor="",
        evidence=tuple(lines),
        advice="Which samples a rank reads must follow from the seed and the step. Look at what chooses them by rank: "
        "a sampler with a seed of its own, or a data set that leaves samples out or doubles them for some ranks.",
    )


def other_contents(ranks: Step, plain: Step) -> tuple[int, int, list[int]] | None:
    """(the data rank, the sample, all such samples) where a sample is not what it is in one process. Rows of another
    shape are padded otherwise and can't be told."""
    wanted = _digests(plain)
    found = [
        (part.group[0], index)
        for part in ranks.parts
        for index, digest in zip(part.indices, part.digests, strict=False)
        if index in wanted and _shape(digest) == _shape(wanted[index]) and digest != wanted[index]
    ]
    return (*found[0], [index for _, index in found]) if found else None


def contents(step: int, rank: int, index: int, all_of_them: Sequence[int]) -> Finding:
    return Finding(
        cause=Cause.CONTENTS,
        step=step,
        quantity="samples",
        tensor="",
        evidence=(
            f"sample {index} on data rank {rank} has other numbers than in one process",
            f"so have {len(all_of_them)} samples of this step: {some(list(all_of_them))}",
        ),
        advice="The data set or collate draws random numbers from a generator that nobody seeds. Use the global one of "
        "torch, numpy or Python: these are seeded for each sample.",
    )


def _digests(step: Step) -> dict[int, str]:
    """Of samples that a step has once."""
    pairs = [pair for part in step.parts for pair in zip(part.indices, part.digests, strict=False)]
    times = Counter(index for index, _ in pairs)
    return {index: digest for index, digest in pairs if times[index] == 1}


def _shape(digest: str) -> str:
    return digest.partition(":")[0]


# ---- weights before the first step, and what they are made of ----


def other_start(name: str, tensor: Tensor, wanted: Tensor | None) -> Finding:
    if tensor.unlike is not None:
        rank, by = tensor.unlike
        line = f"rank {rank}'s copy differs from the first one's by up to {by:.3g}"
    elif wanted is None:
        line = "one process has no such tensor"
    else:
        line = f"differs from one process's by up to {float(np.nanmax(np.abs(tensor.values - wanted.values))):.3g}"
    return Finding(
        cause=Cause.START,
        step=0,
        quantity="weights",
        tensor=name,
        evidence=(line,),
        advice="Weights must follow from the seed alone: not from the rank, from time, or from a generator of the "
        "model's own.",
    )


def is_rounded(tensor: Tensor, other: Tensor) -> bool:
    if tensor.dtype in _LOW:
        return tensor.name.startswith(MODEL) or other.dtype not in _LOW
    return tensor.dtype == "F32" and tensor.bits <= _ROUNDED_BITS and other.bits > _FULL_BITS


def rounded(step: int, kind: str, name: str, tensor: Tensor, other: Tensor) -> Finding:
    if tensor.dtype in _LOW:
        alike = " in one process as well" if other.dtype == tensor.dtype else f", {other.dtype} in one process"
        line = f"{name} is {tensor.dtype}{alike}"
    else:
        line = (
            f"{name} is F32, but its numbers have at most {tensor.bits} of 23 bits behind the first: rounded on the way"
        )
    bits = 7 if tensor.dtype == "BF16" or tensor.bits <= 7 else 10
    return Finding(
        cause=Cause.DTYPE,
        step=step,
        quantity="weights" if kind == MODEL else "optimizer state",
        tensor=name,
        evidence=(line, f"an update smaller than 2**-{bits + 2} of a weight is lost"),
        advice="Weights and optimizer state stay fp32; train.precision: bf16 computes the forward in less. Look for "
        ".half(), .bfloat16(), .to(dtype) or a torch_dtype in the model's own code or configuration.",
    )


# ---- loss ----


def grouping(step: int, plain: Step, grouped: Step, ranks: Step, *, statistics: bool) -> Finding:
    """One process gives another loss for the same samples in other micro-batches: no strategy's doing."""
    lines = (
        f"one process, micro-batches of {sizes(plain.parts)}: loss {plain.losses[0]:.8g}",
        f"one process, the ranks' micro-batches of {sizes(grouped.parts)}: loss {grouped.losses[0]:.8g}",
        f"the ranks: loss {ranks.losses[0]:.8g}",
    )
    if statistics:
        return Finding(
            cause=Cause.STATISTICS,
            step=step,
            quantity="loss",
            tensor="",
            evidence=lines,
            advice="Batch-norm layers normalize over the samples of a micro-batch, so the curve depends on the layout. "
            "GroupNorm and LayerNorm do not.",
        )
    counts = [part.counted for part in grouped.parts]
    return Finding(
        cause=Cause.LOSS,
        step=step,
        quantity="loss",
        tensor="",
        evidence=(*lines, f"what the micro-batches count: {some(counts)}"),
        advice="The loss of a micro-batch is a mean over something else than what `count` says: over its tokens, say, "
        "where samples are counted. Return (sum, count) from the loss, or set `count:` to what the mean is over.",
    )


def loss(step: int, ranks: Step, plain: Step, grouped: Step, worst: float, limit: float) -> Finding:
    wanted = plain.losses[0]
    lines = [f"loss {worst:.8g}, one process {wanted:.8g}: x {worst / wanted:.6g}" if wanted else f"loss {worst:.8g}"]
    parts = [(mine, theirs) for mine, theirs in zip(ranks.parts, grouped.parts, strict=False) if mine.total is not None]
    counts = [(m.group, m.counted, t.counted) for m, t in parts if not close(m.counted, t.counted, 1e-6)]
    if counts:
        (rank, number), mine, theirs = counts[0]
        lines.append(f"rank {rank}, micro-batch {number} counts {mine:g}, one process counts {theirs:g}")
        return _loss_finding(Cause.LOSS, step, lines, _COUNTED)
    ratios = [m.total / t.total for m, t in parts if m.total is not None and t.total]
    if len(ratios) == len(parts) and ratios and all(abs(ratio - 1) <= 4 * limit for ratio in ratios):
        lines.append("the sums and counts of all micro-batches are right, what is made of them is not")
        lines += _mean_that_fits(ranks.parts, worst, limit)
        return _loss_finding(Cause.LOSS, step, lines, DIVIDED)
    lines.append(f"sums of the ranks' micro-batches over one process's: {some([round(r, 6) for r in ratios])}")
    if ratios and same(ratios, 1e-4):
        return _loss_finding(Cause.LOSS, step, lines, DIVIDED)
    group, ratio = next(
        ((m.group, r) for (m, _), r in zip(parts, ratios, strict=False) if abs(r - 1) > limit), ((0, 0), 1)
    )
    lines.append(f"first: rank {group[0]}, micro-batch {group[1]}: x {ratio:.6g}, from equal weights and samples")
    return _loss_finding(Cause.FORWARD, step, lines, _FORWARD)


_COUNTED = "`count` must depend on the batch alone, and on every rank the same way."
_FORWARD = (
    "Look for what depends on the rank or on the layout in the forward: training or evaluation mode, masks, positions, "
    "activations in another precision, a part of the model that was cut without what belongs to it."
)


def _loss_finding(cause: Cause, step: int, lines: Sequence[str], advice: str) -> Finding:
    return Finding(cause=cause, step=step, quantity="loss", tensor="", evidence=tuple(lines), advice=advice)


def _mean_that_fits(parts: Sequence[Part], found: float, limit: float) -> Iterator[str]:
    sums, counts = [part.total or 0.0 for part in parts], [part.counted or 0.0 for part in parts]
    rank_sums, rank_counts = ([sum(v) for v in by_rank(parts, values).values()] for values in (sums, counts))
    tried = {
        "the mean of the ranks' own means": _mean_of_means(rank_sums, rank_counts),
        "the mean of the micro-batches' own means": _mean_of_means(sums, counts),
        **{
            f"the mean of data rank {r} alone": s / c
            for r, (s, c) in enumerate(zip(rank_sums, rank_counts, strict=True))
            if c
        },
    }
    for words, value in tried.items():
        if gap(found, value) <= max(limit, 1e-6):
            yield f"it is {words}: {value:.8g}"
            return


def _mean_of_means(sums: Sequence[float], counts: Sequence[float]) -> float:
    means = [total / count for total, count in zip(sums, counts, strict=True) if count]
    return sum(means) / max(1, len(means))


# ---- buffers ----


def buffer(step: int, name: str, tensor: Tensor, wanted: Tensor) -> Finding:
    lines = []
    if tensor.unlike is not None:
        lines.append(f"rank {tensor.unlike[0]}'s copy differs from the first one's by up to {tensor.unlike[1]:.3g}")
    else:
        lines.append("its copies are equal: what one rank's samples made of it")
    if tensor.values.size == 1:
        lines.append(f"{tensor.values[0]:.7g}, one process has {wanted.values[0]:.7g}")
    else:
        off = np.nanmax(np.abs(tensor.values - wanted.values))
        lines.append(
            f"differs from one process's by up to {off:.3g}, with numbers up to {np.nanmax(np.abs(wanted.values)):.3g}"
        )
    return Finding(
        cause=Cause.BUFFER,
        step=step,
        quantity="buffer",
        tensor=name,
        evidence=tuple(lines),
        advice="The model changes it in its forward, from the samples that this rank sees, once a micro-batch. After a "
        "step all ranks take rank 0's, where it is persistent. Sum what goes into it over ranks, or keep it out of the "
        "result.",
    )
