"""What each strategy can do, as a table without torch: asked before anything starts, and again on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.strategies.config import StrategyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One that not every installation has. `install`: what to do about it, a sentence."""

    module: str
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    devices: frozenset[str]  # "cpu", "cuda"
    precisions: frozenset[str]  # "fp32", "bf16", "fp16"
    needs: tuple[Package, ...] = ()  # besides torch
    elementwise_optimizer: bool = False  # true: an optimizer sees only a part of a tensor
    gathered: bool = False  # true: parameters are whole for a moment only, so autocast must not keep its casts of them
    checkpointing: bool = True  # train.activation_checkpointing
    compile: bool = True  # train.compile
    exact: bool = False  # train.exact
    deferred: bool = False  # model.deferred_init


_DEVICES = frozenset({"cpu", "cuda"})
_PRECISIONS = frozenset({"fp32", "bf16", "fp16"})
_DEEPSPEED = (
    Package(module="deepspeed", install="pip install --no-build-isolation 'dtrain[deepspeed]', or take fsdp."),
)

CAPS = {
    "single": Caps(devices=_DEVICES, precisions=_PRECISIONS, exact=True, deferred=True),
    "ddp": Caps(devices=_DEVICES, precisions=_PRECISIONS, exact=True, deferred=True),
    "fsdp": Caps(
        devices=_DEVICES, precisions=_PRECISIONS, elementwise_optimizer=True, gathered=True, exact=True, deferred=True
    ),
    "horovod": Caps(
        devices=frozenset({"cpu"}),
        precisions=_PRECISIONS,
        needs=(
            Package(
                module="horovod", install="Build it with the nodes' Python: python -m dtrain.launcher.build_horovod"
            ),
        ),
    ),
    "zero1": Caps(devices=_DEVICES, precisions=_PRECISIONS, needs=_DEEPSPEED, elementwise_optimizer=True),
    "zero2": Caps(devices=_DEVICES, precisions=_PRECISIONS, needs=_DEEPSPEED, elementwise_optimizer=True),
    "zero3": Caps(
        devices=_DEVICES,
        precisions=_PRECISIONS,
        needs=_DEEPSPEED,
        elementwise_optimizer=True,
        gathered=True,
        # The compiler of torch 2.13 goes into DeepSpeed 0.19's hooks of every module and compiles them anew for each
        # size, even where only dynamo works: a second step over two ranks had not ended after 100 s.
        compile=False,
    ),
}


def refused(
    name: str, caps: Caps, *, device_type: str, precision: str, checkpointing: bool, compiled: bool, tensor: int = 1
) -> list[str]:
    """In words, what was asked of a strategy and does not go with it."""
    asked = (
        (device_type in caps.devices, f"does not run on {device_type}, only on {_listed(caps.devices)}"),
        (precision in caps.precisions, f"does not compute in {precision}, only in {_listed(caps.precisions)}"),
        (caps.checkpointing or not checkpointing, "does not go with train.activation_checkpointing: set none"),
        (caps.compile or not compiled, "does not go with train.compile: set false"),
        # What a layer of q, k and v gives says by its placement how many matrices it is (tensorops.Blocks), and the
        # compiler of torch 2.13 can't read an attribute of a placement.
        (tensor == 1 or not compiled, f"with tensor {tensor} does not go with train.compile: set false"),
    )
    return [f"{name} {problem}" for fits, problem in asked if not fits]


def refused_deferred(strategy: StrategyConfig, caps: Caps) -> str:
    """Why a model can't be built with model.deferred_init, in words; "" where it can."""
    return "" if caps.deferred else f"does not go with {strategy.name}. Take fsdp, or leave it out."


def _listed(words: frozenset[str]) -> str:
    return " and ".join(sorted(words))
