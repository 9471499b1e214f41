"""The state of a user's data set as plain JSON, and back: what its state_dict() may hold is checked here.

Besides JSON's own values: tuples, bytes, tensors, numpy arrays and numbers, floats that are not finite, and dicts with
keys of any of these kinds. Nothing is pickled; anything else is refused with its place in the state.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dtrain.cluster.errors import CheckpointError, UsageError

Json = Any
_KINDS = "numbers, texts, bytes, lists, tuples, dicts, tensors and numpy arrays"


def encode(value: Any, what: str) -> Json:
    """A copy of `value` as JSON. `what` is what messages call it. Raises UsageError."""
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list):
        return [encode(item, f"{what}[{index}]") for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode(item, f"{what}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, what)
    if isinstance(value, bytes | bytearray):
        return {"$bytes": _text(bytes(value))}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, what)
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject and value.dtype.names is None:
        return {"$numpy": [value.dtype.str, list(value.shape), _text(value.tobytes())], **_scalar(value)}
    raise UsageError(f"{what} is a {type(value).__name__}, which a checkpoint can't hold. It may hold {_KINDS}")


def _encode_mapping(value: Mapping[Any, Any], what: str) -> Json:
    def item(key: Any) -> Json:
        return encode(value[key], f"{what}[{key!r}]")

    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: item(key) for key in value}
    return {"$dict": [[encode(key, f"a key of {what}"), item(key)] for key in value]}


def _encode_tensor(value: torch.Tensor, what: str) -> Json:
    if value.layout != torch.strided or value.is_quantized:
        raise UsageError(f"{what} is a {value.layout} tensor, which a checkpoint can't hold. Keep a dense one")
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return {"$tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), _text(raw)]}


def _scalar(value: np.ndarray[Any, Any] | np.generic) -> dict[str, bool]:
    return {"scalar": True} if isinstance(value, np.generic) else {}


def decode(value: Json) -> Any:
    """What encode() was given. Raises CheckpointError for what encode() never gives."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item) for key, item in value.items()}
    try:
        return _DECODERS[tag](value)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the state of a data stream holds {tag}, which can't be read: {error}") from error


def _decode_tensor(value: Json) -> torch.Tensor:
    dtype, shape, text = value["$tensor"]
    raw = torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    wanted = getattr(torch, dtype)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"{dtype} is no dtype")
    return raw.view(wanted).reshape(shape)


def _decode_numpy(value: Json) -> Any:
    dtype, shape, text = value["$numpy"]
    array = np.frombuffer(_bytes(text), dtype=np.dtype(dtype)).reshape(shape).copy()
    return array[()] if value.get("scalar") else array


_DECODERS: dict[str, Callable[[Json], Any]] = {
    "$float": lambda value: float(value["$float"]),
    "$tuple": lambda value: tuple(decode(item) for item in value["$tuple"]),
    "$dict": lambda value: {decode(key): decode(item) for key, item in value["$dict"]},
    "$bytes": lambda value: _bytes(value["$bytes"]),
    "$tensor": _decode_tensor,
    "$numpy": _decode_numpy,
}


def size_bytes(value: Json) -> int:
    return len(json.dumps(value, allow_nan=False))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
