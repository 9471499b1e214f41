"""DeepSpeed's engine around a model: its settings from our one config, on the process group that is there already.

What leaves DeepSpeed nothing to decide: no schedule, no clipping, no loss scale, no checkpoint of its own; the model is
float32 in its eyes, because our autocast computes in bf16 or fp16 around the forward. It says only warnings.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError

# Partitions are reached through what DeepSpeed does not promise to keep: pyproject.toml pins the same range.
FIRST_VERSION, END_VERSION = (0, 19), (0, 20)

BUCKET_ELEMENTS = 50_000_000  # gradients that are reduced, parameters that are gathered at once: 200 MB
PERSISTENT_ELEMENTS = 32_768  # zero3 leaves smaller parameters (norms, biases) whole on every rank

Engine = Any  # deepspeed.DeepSpeedEngine; the package has no types


class Carrier(torch.optim.Optimizer):
    """What DeepSpeed takes for the user's optimizer: it puts its flat partitions in here, and steps it once for each.
    The optimizer itself works on parameters (zero_partitions.py), so that each has its own state."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__([{"params": list(group["params"])} for group in groups], {"lr": 0.0})
        self.on_flat: Callable[[Tensor], None] = _nobody

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                self.on_flat(flat)


def _nobody(flat: Tensor) -> None:
    raise AssertionError("DeepSpeed has stepped before its partitions were known")


def start_engine(model: nn.Module, carrier: Carrier, stage: int, *, offload: bool, device: torch.device) -> Engine:
    """Partitions `model` in place. Collective. Raises UsageError for a DeepSpeed that this was not written for."""
    deepspeed = _import(device)
    _check_version(deepspeed.__version__)
    deepspeed.init_distributed(
        dist_backend=None, auto_mpi_discovery=False, verbose=False, timeout=timedelta(hours=1), dist_init_required=False
    )
    settings = engine_settings(stage, offload=offload, device_type=device.type)
    deepspeed.utils.logger.setLevel(logging.ERROR)  # that the optimizer is untested is no news: ours is a carrier
    engine, *_ = deepspeed.initialize(model=model, optimizer=carrier, config=settings, dist_init_required=False)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    engine.enable_backward_allreduce = False  # zero_gradients.py says when
    return engine


def engine_settings(stage: int, *, offload: bool, device_type: str) -> Mapping[str, Any]:
    """DeepSpeed's configuration. Batch sizes mean nothing to it: it is told where a step ends."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
        }
    else:
        zero["compute_grad_norm"] = offload  # ours is taken from the same partitions; with offload it insists
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    sums = {} if stage == 3 else {"gradient_allreduce_op": "sum"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 60,
        **sums,
    }


def _import(device: torch.device) -> Any:
    """What the user has set wins; all of it is read at import or at the first collective."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if device.type == "cpu":
        os.environ.setdefault("LOCAL_SIZE", "1")  # else it asks numactl, again and again
    # DeepSpeed 0.19 calls both by their old names
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # Two minutes of compiling, for a collective among ranks of one CPU machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _without_compiler(), contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return deepspeed


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """What is decorated with torch.compile stays as it is. DeepSpeed 0.19 imports its own Muon to ask whether it is the
    optimizer; that has torch import the compiler, which takes each worker three seconds."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _check_version(found: str) -> None:
    version = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not FIRST_VERSION <= version < END_VERSION:
        first, end = (".".join(map(str, v)) for v in (FIRST_VERSION, END_VERSION))
        raise UsageError(unknown(f"only versions from {first} up to {end} are known"))


def unknown(reason: str) -> str:
    """What to say of a DeepSpeed that this was not written for."""
    return (
        f"strategy: DeepSpeed {metadata.version('deepspeed')} is installed, but {reason}, so nothing would be trained "
        f"and saved for certain. Take another version (pip install 'dtrain[deepspeed]'), or fsdp, which does the same"
    )
