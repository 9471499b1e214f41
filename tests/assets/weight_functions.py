"""Functions over ranks: a model that a strategy has spread takes its weights from files."""

from __future__ import annotations

from typing import Any

import odd_models
import parity
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import StorageError
from dtrain.cluster.filestore import FileStorage
from dtrain.runtime import pretrained
from dtrain.runtime.checkpoint import share
from dtrain.runtime.modelconfig import InitConfig
from dtrain.runtime.ranks import Ranks
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import Topology
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.state import OwnState


def initialize(ranks: Ranks, folder: str, strategy: str, wanted: str) -> dict[str, Any]:
    """Loads `folder`; whether every parameter is that of the state in the file `wanted`, and what was read."""
    share.EXCHANGE_BYTES, share.MIN_PART_BYTES = 3 << 20, 1 << 20  # several exchanges
    storage = odd_models.CountingStorage(folder)
    vars(pretrained)["open_storage"] = lambda url: storage
    torch.manual_seed(5)
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    wrapped = get_strategy(strategy).materialize(
        parity.Transformer(),
        lambda m: torch.optim.AdamW(m.parameters()),
        StrategyConfig(name="ddp"),
        topology,
        ranks.device,
    )
    found = pretrained.initialize(InitConfig(url=folder), wrapped.module, wrapped.state, ranks)
    expected: dict[str, Tensor] = torch.load(wanted, weights_only=True)
    state = {name: _full(tensor) for name, tensor in wrapped.module.state_dict().items()}
    return {
        "same": all(torch.equal(state[name], tensor) for name, tensor in expected.items()),
        "dtypes": sorted({str(tensor.dtype) for tensor in state.values()}),
        "bytes": storage.bytes_read,
        "stored": found.bytes_stored,
        "loaded": found.num_loaded,
    }


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fail_to_read(ranks: Ranks, folder: str) -> None:
    """Rank 0 alone reads the headers, and its store fails."""

    class Failing(FileStorage):
        def read_into(self, key: str, offset: int, target: memoryview) -> None:
            raise StorageError("the store has gone")

    if ranks.global_rank == 0:
        from dtrain.runtime import weightfiles

        vars(weightfiles)["open_storage"] = Failing
    model = parity.Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = OwnState(model=model, optimizer=optimizer, world_size=ranks.world_size)
    pretrained.initialize(InitConfig(url=folder), model, state, ranks)
