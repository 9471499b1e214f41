"""Checkpoints in a script's own hands, under dtrain, torchrun or plain python: `save` and `load` over the ranks of its
default process group, in the format of every other checkpoint, and `wait` for a save that goes on in the background.

What a state may hold is tree.py's; which attempt writes is settled at the first save, from what was loaded before it.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import CheckpointError
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import Storage, open_storage
from dtrain.runtime import session
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.checkpointer import Checkpointer, Committed
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.share import load_shared
from dtrain.runtime.checkpoint.tree import Filling, Tree, flatten
from dtrain.runtime.checkpoint.world import World, current_world
from dtrain.runtime.mirroring import before_commit
from dtrain.strategies.boxes import Box, TensorSpec
from dtrain.strategies.state import describe

_VALUES = "values"  # of a manifest's state: the tree
_STRATEGY = "script"
_COMPARED_BYTES = 1 << 16  # tensors up to this size are compared between ranks

Place = tuple[int, int]  # (step, attempt); (0, 0): the beginning


def save(url: str, step: int, state: dict[str, Any], *, keep: int | None = None, wait: bool = True) -> None:
    """Saves `state` as the checkpoint of `step` in `url`. Collective over the default process group, if there is one.

    `state` is a nested dict of tensors, DTensors, objects with state_dict (modules, optimizers, schedules) and JSON
    values, the same on every rank; only DTensors differ. It may be changed as soon as this returns. `keep`: only the
    newest so many checkpoints stay. `wait` False: it is written in the background, and a failure is raised by the
    next save or by `wait()`.

    Raises CheckpointError or StorageError, on every rank; ValueError for a step below 1.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"checkpoint.save: step {step!r}: expects a whole number from 1 on")
    world, store = current_world(), _store(url)
    tree, tensors = flatten(state)
    _check_equal(world, tree, tensors)
    specs, local = _described(tensors, world)
    checkpointer = store.checkpointer(world, keep)
    world.agree(_failure(lambda: checkpointer.save(step, specs, local, {"step": step, _VALUES: tree})))
    if wait:
        world.agree(_failure(checkpointer.wait))


def load(url: str, state: dict[str, Any], step: int | None = None) -> int | None:
    """Fills `state` in place from the newest checkpoint in `url`, or from that of `step`; which step it was, None where
    there is none. Collective over the default process group, whatever number of ranks has saved it.

    Tensors are filled, objects get their state by load_state_dict, other values are replaced. Keys of `state` itself
    may be left out to load a part; an empty dict takes everything there was, its tensors on the CPU. A checkpoint that
    dtrain's trainer has saved serves modules and tensors: `load(url, {"model": model})`.

    Raises CheckpointError listing all that does not fit, before anything is changed, and where there is no `step`;
    CorruptCheckpoint.
    """
    world, store = current_world(), _store(url)
    place = store.newest(world) if step is None else store.of_step(world, step)
    if place is None:
        return None
    manifest = read_manifest(store.storage, *place)
    filling = Filling({name: (info.dtype, info.shape) for name, info in manifest.tensors.items()})
    filling.value((), _tree(manifest, state), state, "some")
    if filling.problems:
        shown = "\n  ".join(filling.problems[:20])
        more = f"\n  and {len(filling.problems) - 20} more" if len(filling.problems) > 20 else ""
        raise CheckpointError(f"step {place[0]} in {url} does not fit:\n  {shown}{more}")
    specs, local = _described(filling.requests, world)
    requests = ((name, box, part) for name, parts in local.items() for box, part in parts if box.num_elements)
    load_shared(store.storage, manifest, specs, requests, rank=world.rank, world_size=world.size, group=world.group)
    filling.finish()
    store.loaded_from(place)
    _tell_resumed(place, manifest, world, store)
    return place[0]


def wait() -> None:
    """Until the saves that this process has begun are written. Raises what went wrong with this rank's part, on rank 0
    with any rank's. Not collective."""
    for store in _stores.values():
        store.wait()


class _Store:
    """One URL, and this process's attempt there."""

    def __init__(self, storage: Storage, url: str) -> None:
        self.storage = storage
        place = session.attached()
        self._place = place if place is not None and _absolute(place.checkpoint_url) == url else None
        env = None if self._place is None else self._place.env
        # Under dtrain the run has begun an attempt in this store already, from the newest checkpoint.
        self._given: tuple[int, Place] | None = None
        if env is not None:
            self._given = (env.attempt, (env.resume_step, env.resume_attempt))
        self._loaded: Place = (0, 0)
        self._checkpointer: Checkpointer | None = None
        self._keep: int | None = None
        self._attempt = 0
        self._world: World | None = None

    @property
    def is_of_the_run(self) -> bool:
        return self._place is not None

    def newest(self, world: World) -> Place | None:
        if self._given is not None and self._checkpointer is None:
            return self._given[1] if self._given[1][0] else None
        found = world.from_first(lambda: _place_of(newest_live(live_checkpoints(self.storage))))
        return None if found is None else (found[0], found[1])

    def of_step(self, world: World, step: int) -> Place:
        def look() -> list[int]:
            live = [info for info in live_checkpoints(self.storage) if info.live]
            found = _place_of(newest_live(info for info in live if info.step == step))
            if found is None:
                steps = ", ".join(str(info.step) for info in live) or "none"
                raise CheckpointError(f"no live checkpoint of step {step} in {self.storage.url}. Live steps: {steps}.")
            return found

        self.wait()  # of this process's own
        found = world.from_first(look)
        return found[0], found[1]

    def loaded_from(self, place: Place) -> None:
        """What is saved from here on goes on from there, as an attempt of its own."""
        self.close()
        self._loaded = place

    def checkpointer(self, world: World, keep: int | None) -> Checkpointer:
        if self._checkpointer is None or self._world is not world:
            self.close()
            self._attempt = self._begin(world)
        elif keep != self._keep:
            self._checkpointer.wait()
            self._checkpointer = None
        if self._checkpointer is None:
            self._keep, self._world = keep, world
            self._checkpointer = Checkpointer(
                self.storage,
                attempt=self._attempt,
                rank=world.rank,
                world_size=world.size,
                strategy={"name": _STRATEGY},
                board=world.board,
                on_commit=self._tell_committed,
                keep=keep,
                before_commit=before_commit(RunDir(self._place.env.run_dir)) if self._place else lambda: None,
            )
        return self._checkpointer

    def _begin(self, world: World) -> int:
        given, self._given = self._given, None
        if given is not None and given[1] == self._loaded:
            return given[0]

        def claim() -> int:
            job_id = os.environ.get("TORCHELASTIC_RUN_ID", "") if self._place is None else self._place.env.job_id
            return claim_attempt(self.storage, host=socket.gethostname(), job_id=job_id, fresh_from=self._loaded).number

        return int(world.from_first(claim))

    def _tell_committed(self, done: Committed) -> None:
        if self._place is not None:
            self._place.report.event(
                "checkpoint_committed", step=done.step, bytes=done.bytes, seconds=round(done.seconds, 3)
            )

    def wait(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None


_stores: dict[str, _Store] = {}


def _store(url: str) -> _Store:
    url = _absolute(url)
    if not _stores:
        atexit.register(wait)  # a daemon thread would take a save that nobody waited for along
    if url not in _stores:
        _stores[url] = _Store(open_storage(url), url)
    return _stores[url]


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(url)


def _place_of(info: Any) -> list[int] | None:
    return None if info is None else [info.step, info.attempt]


def _failure(act: Callable[[], None]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


Local = dict[str, list[tuple[Box, Tensor]]]


def _described(tensors: dict[str, Tensor], world: World) -> tuple[list[TensorSpec], Local]:
    found = {name: describe(name, tensor.detach(), world.size) for name, tensor in tensors.items()}
    return [spec for spec, _ in found.values()], {name: boxes for name, (_, boxes) in found.items()}


def _tree(manifest: Manifest, state: dict[str, Any]) -> Tree:
    """Of a trainer's checkpoint: what the state's own modules and tensors would give."""
    if _VALUES in manifest.state:
        return manifest.state[_VALUES]
    for key, value in state.items():
        if not isinstance(value, Tensor | nn.Module):
            raise CheckpointError(
                f"{key}: step {manifest.step} was saved by dtrain's trainer and serves modules and tensors alone. "
                "Leave this key out"
            )
    return flatten(state)[0]


def _tell_resumed(place: Place, manifest: Manifest, world: World, store: _Store) -> None:
    attached = session.attached()
    if attached is not None and store.is_of_the_run and world.rank == 0:
        attached.report.event(
            "resumed",
            step=place[0],
            from_attempt=place[1],
            strategy=str(manifest.strategy.get("name")),
            world_size=manifest.world_size,
        )


# ---- what must not differ between ranks ----


def _check_equal(world: World, tree: Tree, tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError on every rank where ranks would save different things under one name. Small tensors on the
    CPU, as random states are, are compared too: ranks share the writing of what all of them hold."""
    if world.size == 1:
        return
    digests = _digests(tree, tensors)
    whole = _digest(json.dumps(digests).encode())
    if len(set(world.say(whole))) == 1:
        return
    said = world.say(digests)
    names = {name for digests in said for name in digests}
    differing = sorted(name for name in names if len({digests.get(name) for digests in said}) > 1)
    raise CheckpointError(
        f"checkpoint.save: {', '.join(differing[:10])}{', ...' if len(differing) > 10 else ''} not equal on all ranks. "
        "A state is the same everywhere, but for DTensors: gather what each rank has of its own (a random state, a "
        "local loss) on every rank first, or leave it out"
    )


def _digests(tree: Tree, tensors: dict[str, Tensor]) -> dict[str, str]:
    found = {path: _digest(json.dumps(value).encode()) for path, value in _leaves(tree, "")}
    for name, tensor in tensors.items():
        described = [str(tensor.dtype), list(tensor.shape), isinstance(tensor, DTensor)]
        small = not isinstance(tensor, DTensor) and tensor.device.type == "cpu" and tensor.nbytes <= _COMPARED_BYTES
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if small else b""
        found[name] = _digest(json.dumps(described).encode() + content)
    return found


def _digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _leaves(tree: Tree, path: str) -> list[tuple[str, Tree]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if children is None:
        return [(path, tree)]
    return [leaf for key, child in children for leaf in _leaves(child, f"{path}.{key}" if path else str(key))]
