"""Element types by safetensors' names, without torch. https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

from dtrain.cluster.errors import CheckpointError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


def item_bytes(dtype: str) -> int:
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise CheckpointError(f"no element type {dtype!r}. Known: {', '.join(ITEM_BYTES)}") from None
