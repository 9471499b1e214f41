"""What each strategy can do, as a table without torch: asked before anything starts, and again on each rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    devices: frozenset[str]  # "cpu", "cuda"
    precisions: frozenset[str]  # "fp32", "bf16", "fp16"
    needs: tuple[str, ...] = ()  # packages besides torch
    elementwise_optimizer: bool = False  # true: an optimizer sees only a part of a tensor
    checkpointing: bool = True  # train.activation_checkpointing
    compile: bool = True  # train.compile


_DEVICES = frozenset({"cpu", "cuda"})
_PRECISIONS = frozenset({"fp32", "bf16", "fp16"})

CAPS = {
    "single": Caps(devices=_DEVICES, precisions=_PRECISIONS),
    "ddp": Caps(devices=_DEVICES, precisions=_PRECISIONS),
    "fsdp": Caps(devices=_DEVICES, precisions=_PRECISIONS, elementwise_optimizer=True),
}


def refused(
    name: str, caps: Caps, *, device_type: str, precision: str, checkpointing: bool, compiled: bool
) -> list[str]:
    """In words, what was asked of a strategy and does not go with it."""
    asked = (
        (device_type in caps.devices, f"does not run on {device_type}, only on {_listed(caps.devices)}"),
        (precision in caps.precisions, f"does not compute in {precision}, only in {_listed(caps.precisions)}"),
        (caps.checkpointing or not checkpointing, "does not go with train.activation_checkpointing: set none"),
        (caps.compile or not compiled, "does not go with train.compile: set false"),
    )
    return [f"{name} {problem}" for fits, problem in asked if not fits]


def _listed(words: frozenset[str]) -> str:
    return " and ".join(sorted(words))
