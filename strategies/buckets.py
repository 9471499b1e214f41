"""Which gradients travel together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

BUCKET_BYTES = 25 << 20  # DDP's default; the first bucket is small so that communication starts early
FIRST_BUCKET_BYTES = 1 << 20


def split_into_buckets(parameters: Sequence[nn.Parameter], sizes: Sequence[int]) -> list[list[nn.Parameter]]:
    """Buckets of one dtype and device each, filled in order up to the limit. `sizes`: elements of each parameter's
    gradient, the same on all ranks that exchange them."""
    chunks: list[list[nn.Parameter]] = []
    open_chunks: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    filled: dict[int, int] = defaultdict(int)
    for parameter, size in zip(parameters, sizes, strict=True):
        key = (parameter.dtype, parameter.device)
        chunk = open_chunks.get(key)
        limit = FIRST_BUCKET_BYTES if chunk is not None and chunk is chunks[0] else BUCKET_BYTES
        if chunk is None or filled[id(chunk)] >= limit:
            chunk = open_chunks[key] = []
            chunks.append(chunk)
        chunk.append(parameter)
        filled[id(chunk)] += size * parameter.element_size()
    return chunks
