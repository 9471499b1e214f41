"""`model.init_from`: a model that is spread over ranks already takes its weights from safetensors files.

Each rank reads the byte ranges of what it holds, and what all ranks hold leaves the store once. Which files there are
is weightfiles.py's, which tensor goes where weightmatch.py's.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import StorageError, UsageError
from dtrain.cluster.storage import Storage, open_storage
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.loader import Request, run_all
from dtrain.runtime.checkpoint.ranges import byte_runs, byte_span, pieces, strides_of
from dtrain.runtime.checkpoint.share import fill_shared
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.runtime.hfnames import Translate, as_they_are
from dtrain.runtime.modelconfig import InitConfig
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.weightfiles import StoredTensor, WeightFiles, find_weights
from dtrain.runtime.weightmatch import Match, Wanted, match_weights
from dtrain.strategies.boxes import Box, TensorSpec, whole
from dtrain.strategies.protocol import State
from dtrain.strategies.telling import broadcast_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialized:
    """What was loaded, and what was not, by canonical names (`unexpected`: by the names there, mapped)."""

    url: str
    num_loaded: int
    bytes_stored: int  # of what was loaded, as it is stored
    seconds: float
    fresh: tuple[str, ...]
    replaced: tuple[str, ...]
    unexpected: tuple[str, ...]


def initialize(
    config: InitConfig, model: nn.Module, state: State, ranks: Ranks, translate: Translate = as_they_are
) -> Initialized:
    """Fills the parameters and persistent buffers of a model that a strategy has made ready. `translate`: what
    the names that config.map gives are in this model. Collective.

    Raises UsageError on every rank together where the weights do not fit, StorageError where they can't be read.
    """
    started = time.monotonic()
    files = _find_together(config.url, ranks)
    tensors = _model_tensors(model, state)
    match = match_weights([wanted for wanted, _, _ in tensors], files.tensors, config, translate)
    specs = [spec for _, spec, _ in tensors if spec.name in match.sources]
    requests = [
        (spec.name, box, target)
        for _, spec, boxes in tensors
        for box, target in boxes
        if spec.name in match.sources and box.num_elements
    ]
    storage = open_storage(files.url)
    fill_shared(
        lambda wanted: _read_all(storage, match, wanted),
        specs,
        requests,
        rank=ranks.global_rank,
        world_size=ranks.world_size,
    )
    state.written()
    return Initialized(
        url=config.url,
        num_loaded=len(match.sources),
        bytes_stored=sum(stored.end - stored.begin for stored in match.sources.values()),
        seconds=time.monotonic() - started,
        fresh=match.fresh,
        replaced=match.replaced,
        unexpected=match.unexpected,
    )


def initialized_lines(found: Initialized) -> list[str]:
    """For a person."""
    size, rate = found.bytes_stored / 1e6, found.bytes_stored / 1e6 / max(found.seconds, 1e-9)
    lines = [f"weights   {found.num_loaded} tensors, {size:,.1f} MB ({rate:,.0f} MB/s), from {found.url}"]
    words = {
        "fresh": "start from their initial values",
        "replaced": "start from their initial values, not from those stored there",
        "unexpected": "stored there, not in this model: not loaded",
    }
    told = {kind: names for kind, names in _kinds(found).items() if names}
    return lines + [f"          {len(names)} {words[kind]}: {_some(names)}" for kind, names in told.items()]


def initialized_event(found: Initialized) -> dict[str, Any]:
    """The fields of the record `initialized`; names beyond the first hundred of a kind are counted only."""
    return {
        "url": found.url,
        "tensors": found.num_loaded,
        "bytes": found.bytes_stored,
        "seconds": round(found.seconds, 3),
        **{kind: {"count": len(names), "names": list(names[:100])} for kind, names in _kinds(found).items()},
    }


def _kinds(found: Initialized) -> dict[str, tuple[str, ...]]:
    return {"fresh": found.fresh, "replaced": found.replaced, "unexpected": found.unexpected}


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


Described = tuple[Wanted, TensorSpec, list[tuple[Box, Tensor]]]


def _model_tensors(model: nn.Module, state: State) -> list[Described]:
    """Parameters and persistent buffers, each once: what is wanted, how it is spread, and this rank's boxes of it."""
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names: dict[int, list[str]] = defaultdict(list)  # a tied tensor has several
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    specs, local, _ = state.canonical()
    found = []
    for spec in specs:
        kind, _, name = spec.name.partition(".")
        if kind == "model":
            known = tuple(names[id(tensors[name])]) if name in tensors else (name,)
            wanted = Wanted(names=known, dtype=spec.dtype, shape=spec.shape)
            found.append((wanted, replace(spec, name=known[0]), local.get(spec.name, [])))
    return found


def _find_together(url: str, ranks: Ranks) -> WeightFiles:
    """Rank 0 reads the headers, all get them: JSON. Raises on every rank what it raised."""
    answer = _answer(url) if ranks.global_rank == 0 else ""
    if ranks.world_size > 1:
        answer = broadcast_text(answer, 0)
    said = json.loads(answer)
    if "problem" in said:
        raise (UsageError if said["usage"] else StorageError)(f"model.init_from: {said['problem']}")
    tensors = {
        name: StoredTensor(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in said["tensors"].items()
    }
    return WeightFiles(url=said["url"], tensors=tensors)


def _answer(url: str) -> str:
    try:
        return json.dumps(asdict(find_weights(url)))
    except (UsageError, StorageError) as error:
        return json.dumps({"problem": str(error), "usage": isinstance(error, UsageError)})


def _read_all(storage: Storage, match: Match, requests: Iterable[Request]) -> None:
    """Any box of a stored tensor into any tensor of its shape, in the dtype of the latter."""
    run_all(_read, ((storage, match.sources[name], box, target) for name, box, target in requests))


def _read(storage: Storage, stored: StoredTensor, box: Box, target: Tensor) -> None:
    everything, item = whole(stored.shape), item_bytes(stored.dtype)
    for part in pieces(box, everything, item):
        begin, end = byte_span(part, everything, item)
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        view = buffer.numpy().data
        for low, high in byte_runs(part, everything, item):
            storage.read_into(stored.file, stored.begin + low, view[low - begin : high - begin])
        source = torch.as_strided(buffer.view(TORCH_DTYPES[stored.dtype]), part.shape, strides_of(stored.shape), 0)
        target[part.relative_to(box)].copy_(source)
