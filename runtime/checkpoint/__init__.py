"""Checkpoints: sharded, checksummed, committed by a manifest, loadable in any layout. See docs/checkpoints.md.

    from dtrain.runtime import checkpoint

`save`, `load` and `wait` are for scripts of one's own (docs/scripts.md), `load_model` fills a plain module; torch comes
with the first use of one of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.runtime.checkpoint.functional import load, save, wait
    from dtrain.runtime.checkpoint.loader import load_model

__all__ = ["load", "load_model", "save", "wait"]
_HOMES = {"load": "functional", "load_model": "loader", "save": "functional", "wait": "functional"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
