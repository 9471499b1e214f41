"""What torch's DTensor lacks for a cut transformer: attention on a CPU, several matrices in one layer, plain tensors
(masks, positions) met inside a forward."""

from __future__ import annotations

import contextlib
import traceback
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import implicit_replication, register_sharding
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.cluster.errors import UsageError
from dtrain.strategies.tensorplan import is_conv1d

_FOR_GOOD = contextlib.ExitStack()  # keeps the context open; torch 2.13 has no other way to say it


@cache
def teach_torch() -> None:
    """Once a process. A plain tensor that meets a DTensor is the same on all tensor ranks here: they read the same
    samples, and every parameter is a DTensor."""
    _FOR_GOOD.enter_context(implicit_replication())
    rules = DTensor._op_dispatcher.sharding_propagator
    for operation, rule in (
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, _attention),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default, _attention_backward),
    ):
        register_sharding(operation)(rule)
        # Once more: what torch finds by a rule it keeps for calls alike, and calls with other masks are not.
        info = RuntimeSchemaInfo(static_kwargkey=["attn_mask"], needs_pytree=True)
        rules.register_op_strategy(operation, rules.op_strategy_funcs[operation], info)


def explain_cut_tensors(error: Exception) -> None:
    """Adds to what torch says of an operation that it can't do on cut tensors."""
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    if not isinstance(error, UsageError) and any("/torch/distributed/tensor/" in file for file in files):
        error.add_note(
            "strategy.tensor: the model's parameters and activations are torch's DTensors then, and this operation "
            "can't work on them as it is called here (recurrent layers can't, nor can what depends on values, like "
            "nonzero). Without sequence_parallel more can. Or set tensor: 1, with fsdp or pipeline for a large model, "
            "or write it in other operations"
        )


_Placements = list[Any]
_WAYS = (Replicate(), Shard(0), Shard(1))  # whole, by samples, by heads


def _attention(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **more: Any
) -> list[tuple[_Placements, _Placements]]:
    """q, k, v (batch, heads, seq, dim) -> output, and the logarithms of sums (batch, seq, heads or heads, seq)."""
    return [([way, way], [way, way, way, None, None, *mask]) for way, mask in _ways(more)]


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, dropout: float, causal: bool, **more: Any
) -> list[tuple[_Placements, _Placements]]:
    return [([way] * 3, [way] * 6 + [None, None, *mask]) for way, mask in _ways(more)]


def _ways(more: dict[str, Any]) -> list[tuple[Any, _Placements]]:
    """How attention can be cut, and where its mask lies then. Torch 2.13 moves no tensors that are passed by keyword: a
    mask stays whole, so that one with something else for each head, or sample, asks for whole heads, or samples."""
    mask = more.get("attn_mask")
    if mask is None:
        return [(way, []) for way in _WAYS]
    shape = (1,) * (4 - len(mask.shape)) + tuple(mask.shape)
    return [(way, [Replicate()]) for way in _WAYS if not isinstance(way, Shard) or shape[way.dim] == 1]


class Blocks(DTensor):
    """The output of a layer that holds several matrices (q, k and v), cut inside each one along the last dim. To take
    them apart needs no communication; torch's own rule for `chunk` and `split` would gather everything."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            apart = _taken_apart(func, args, kwargs or {})
            return func(*args, **(kwargs or {})) if apart is None else apart


_CHUNKS = (torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split)
_SPLITS = (torch.split, Tensor.split, torch.functional.split)


def _taken_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """The matrices, where `func` asks for just these."""
    if func not in _CHUNKS and func not in _SPLITS:
        return None
    tensor, asked, *more = args if len(args) > 1 else (*args, next(iter(kwargs.values())))
    dim = more[0] if more else kwargs.get("dim", 0)
    (place,) = tensor.placements
    blocks = getattr(place, "split_factor", 1)
    size = tensor.shape[-1] // blocks
    wanted = asked == blocks if func in _CHUNKS else asked in (size, [size] * blocks, (size,) * blocks)
    if not wanted or dim not in (-1, tensor.ndim - 1) or blocks == 1:
        return None
    parts: tuple[Tensor, ...] = tensor.unflatten(-1, (blocks, size)).unbind(-2)
    return parts


def compute_in_blocks(module: nn.Module, blocks: int, mesh: DeviceMesh) -> None:
    """In place: the forward of a layer whose weight is `blocks` matrices, cut inside each one, (..., inputs) ->
    (..., outputs); not of a layer with a forward of its own. Torch 2.13 knows no product with such a weight: it gathers
    weight, bias and gradient. Each rank's own part of the product needs nobody."""
    transposed = is_conv1d(module)
    if not transposed and type(module).forward is not nn.Linear.forward:
        return

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor) or not isinstance(self.weight, DTensor):  # a pipeline's other stages
            whole: Tensor = type(self).forward(self, x)
            return whole
        weight, bias = _parts(self)
        local = F.linear(x.to_local(grad_placements=(Partial(),)), weight.t() if transposed else weight, bias)
        shape = (*x.shape[:-1], mesh.size() * local.shape[-1])
        stride = torch.empty(shape, device="meta").stride()
        places = (_StridedShard(x.ndim - 1, split_factor=blocks),)
        return DTensor.from_local(local, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)

    module.forward = MethodType(forward, module)


def _parts(layer: Any) -> tuple[Tensor, Tensor | None]:
    """This rank's part of weight and bias; their gradients lie where they do."""
    return layer.weight.to_local(), None if layer.bias is None else layer.bias.to_local()


def as_blocks(output: Tensor, blocks: int) -> Tensor:
    """Marks a cut module's output as `blocks` matrices in one."""
    if type(output) is DTensor:
        output.__class__ = Blocks
    return output
