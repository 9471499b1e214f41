"""Saving: each rank stages its share of the state and writes it in the background; rank 0 commits.

A step is committed by its manifest, which rank 0 writes after every rank has told it, through a Board, that its file
is durable. No collective is used. What is saved and when is the trainer's affair.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from dtrain.cluster.errors import CheckpointError, DtrainError, FencedError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint import fields, names
from dtrain.runtime.checkpoint.attempts import check_fence
from dtrain.runtime.checkpoint.board import Board
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.index import Entry, FileIndex, block_sums, encode_index, header_of
from dtrain.runtime.checkpoint.manifest import FileInfo, Manifest, encode_manifest
from dtrain.runtime.checkpoint.plan import Share, manifest_tensors, plan_shares
from dtrain.runtime.checkpoint.retention import apply_retention
from dtrain.runtime.checkpoint.scores import BestRule, Score, Scores, put_score
from dtrain.runtime.checkpoint.staging import Staging
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.strategies.boxes import Box, TensorSpec

Local = Mapping[str, Sequence[tuple[Box, Tensor]]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """`bytes`: of all ranks' data. `seconds`: from the call of save() to the commit, training going on meanwhile."""

    step: int
    attempt: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One save, staged. Entries' offsets count from the beginning of the staged data."""

    step: int
    specs: tuple[TensorSpec, ...]
    entries: tuple[Entry, ...]
    size_bytes: int
    state: dict[str, Any]
    began: float  # time.monotonic()


class Checkpointer:
    """Saves checkpoints of one rank of one attempt. One save is in flight at a time.

    A save that fails leaves no manifest. Its error is raised by wait(), or by the next save() if nobody waited. After
    that a later step may be saved; except after FencedError: then this process must end.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        attempt: int,
        rank: int,
        world_size: int,
        strategy: dict[str, Any],
        board: Board,
        on_commit: Callable[[Committed], None],
        keep: int | None,
        best: BestRule | None = None,
        before_commit: Callable[[], None] = lambda: None,
        timeout_s: float = 3600.0,
    ) -> None:
        """`best`: which ones stay besides the newest `keep`. `before_commit` and `on_commit` are called on rank 0, from
        the background thread. `timeout_s`: how long rank 0 waits for the other ranks' files before the save fails."""
        self._storage = storage
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._strategy = strategy
        self._board = board
        self._before_commit = before_commit
        self._on_commit = on_commit
        self._keep = keep
        self._best = best
        self._scores = Scores(storage)
        self._timeout_s = timeout_s
        self._staging = Staging()
        self._planned: tuple[tuple[TensorSpec, ...], list[Share]] = ((), [])
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the newest step
        self._error_told = False
        self._newest_step = -1

    @property
    def attempt(self) -> int:
        return self._attempt

    def save(self, step: int, specs: Sequence[TensorSpec], local: Local, state: dict[str, Any]) -> None:
        """Stages this rank's share of the global state. The caller may change its tensors as soon as this returns.

        Waits for the save before it. `specs` and `state` are equal on every rank; `state` is JSON (rank 0's is kept).
        A step that this attempt has saved already is left as it is.
        """
        began = time.monotonic()
        self._join()
        if not self._error_told or step == self._newest_step or isinstance(self._error, FencedError):
            self._raise_error()
        if step == self._newest_step:
            return
        entries = self._stage(specs, local)
        job = _Job(
            step=step,
            specs=self._planned[0],
            entries=entries,
            size_bytes=entries[-1].end if entries else 0,
            state=json.loads(_plain_json(step, state)) if self._rank == 0 else {},
            began=began,
        )
        self._newest_step, self._error, self._error_told = step, None, False
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def rate(self, step: int, attempt: int, metrics: Mapping[str, float]) -> None:
        """Keeps what an evaluation of a saved step gave beside its checkpoint, and tidies up by it: in the background,
        after the save in flight. Rank 0's affair. What goes wrong is logged: the run can do without it."""
        if self._rank:
            return
        score = Score(metrics=dict(metrics), rule=self._best or BestRule())
        arguments = (step, attempt, score, self._thread)
        self._thread = threading.Thread(target=self._rate, args=arguments, name=f"rating-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the last save is committed (rank 0) or this rank's part of it is written (others)."""
        self._join()
        self._raise_error()

    def close(self) -> None:
        """Waits for the save in flight, whatever becomes of it, and gives the staging memory back."""
        self._join()
        self._staging = Staging()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_told = True
            raise self._error

    def _stage(self, specs: Sequence[TensorSpec], local: Local) -> tuple[Entry, ...]:
        if self._planned[0] != tuple(specs):
            self._planned = (tuple(specs), plan_shares(specs, self._rank, self._world_size))
        by_name = {spec.name: spec for spec in specs}
        entries = _entries(self._planned[1], by_name)
        sources = [_source(entry, by_name[entry.name], local) for entry in entries]
        on_gpu = any(source.is_cuda for source in sources)
        self._staging.reserve(entries[-1].end if entries else 0, pinned=on_gpu)
        for entry, source in zip(entries, sources, strict=True):
            self._staging.copy_in(entry.begin, source)
        if on_gpu:
            torch.cuda.synchronize()
        return entries

    def _run(self, job: _Job) -> None:
        """The background: errors are kept for wait(), and told to the committer, which must not wait for us."""
        try:
            try:
                written = self._write(job)
            except Exception as error:
                self._post(job.step, {"error": f"{type(error).__name__}: {error}"})
                raise
            self._post(job.step, written)
            if self._rank == 0:
                self._commit(job)
        except Exception as error:
            self._error = error

    def _write(self, job: _Job) -> dict[str, Any]:
        """This rank's data and index, durable under their names; what the manifest has to say about them."""
        if not job.entries:
            return {"bytes": 0}
        directory, writer = names.step_dir(job.step, self._attempt), names.writer_name(self._rank)
        header = header_of(job.entries)
        size_bytes = len(header) + job.size_bytes
        stored: list[Entry] = []

        def parts() -> Iterator[memoryview]:
            """The checksums are taken on the way: while one entry is summed up, those before it are being sent."""
            yield memoryview(header)
            for entry in job.entries:
                data = self._staging.view(entry.begin, entry.end)
                begin, end = entry.begin + len(header), entry.end + len(header)
                stored.append(replace(entry, begin=begin, end=end, blocks=block_sums(data)))
                yield data

        # Nobody else writes under these names, so nothing has to be absent for them.
        self._storage.upload(f"{directory}/{writer}{names.DATA_SUFFIX}", parts(), size_bytes)
        index = encode_index(
            FileIndex(
                file=writer + names.DATA_SUFFIX,
                header_bytes=len(header),
                size_bytes=size_bytes,
                entries=tuple(stored),
            )
        )
        self._storage.upload(f"{directory}/{writer}{names.INDEX_SUFFIX}", [memoryview(index)], len(index))
        return {"bytes": size_bytes, "index_xxh3": xxhash.xxh3_128_hexdigest(index)}

    def _post(self, step: int, message: dict[str, Any]) -> None:
        self._board.set(self._board_key(step, self._rank), json.dumps(message).encode())

    def _board_key(self, step: int, rank: int) -> str:
        return f"checkpoint/{self._attempt}/{step}/{rank}"

    def _commit(self, job: _Job) -> None:
        files = self._collect(job.step)
        manifest = Manifest(
            step=job.step,
            attempt=self._attempt,
            created_at=time.time(),
            world_size=self._world_size,
            strategy=self._strategy,
            tensors=manifest_tensors(job.specs, self._world_size),
            files=files,
            state=job.state,
        )
        self._before_commit()
        # An attempt that begins between this check and the next line is safe too: what we commit then lies beyond the
        # step that it went on from, so nobody loads it.
        check_fence(self._storage, self._attempt)
        self._storage.put_if_absent(names.manifest_key(manifest.dir), encode_manifest(manifest))
        seconds = time.monotonic() - job.began
        self._on_commit(Committed(step=job.step, attempt=self._attempt, bytes=manifest.size_bytes, seconds=seconds))
        self._tidy()

    def _collect(self, step: int) -> tuple[FileInfo, ...]:
        deadline = time.monotonic() + self._timeout_s
        files, problems = [], []
        for rank in range(self._world_size):
            try:
                raw = self._board.wait(self._board_key(step, rank), max(0.0, deadline - time.monotonic()))
                message = fields.parse_object(raw, f"rank {rank}'s report")
            except Exception as error:
                problems.append(f"rank {rank} did not report: {error}")
                break
            if "error" in message:
                problems.append(f"rank {rank}: {message['error']}")
            elif message["bytes"]:
                files.append(_file_info(rank, message))
        if problems:
            self._discard(names.step_dir(step, self._attempt))
            raise CheckpointError(f"step {step} was not saved: {'; '.join(problems)}")
        return tuple(files)

    def _discard(self, directory: str) -> None:
        """The files of a save that failed make room, as the disk may be full. A writer that is still at work leaves
        one behind, which retention finds later."""
        with contextlib.suppress(DtrainError, OSError):
            self._storage.delete(*[info.key for info in self._storage.list(f"{directory}/")])

    def _rate(self, step: int, attempt: int, score: Score, saving: threading.Thread | None) -> None:
        if saving is not None:
            saving.join()
        if step == self._newest_step and self._error is not None:
            return  # there is no checkpoint to rate
        try:
            put_score(self._storage, step, attempt, score)
        except (DtrainError, OSError) as error:
            _log.warning("the evaluation of step %d could not be kept with its checkpoint: %s", step, error)
        self._tidy()

    def _tidy(self) -> None:
        if self._keep is None:
            return
        try:
            apply_retention(self._storage, keep=self._keep, best=self._best, scores=self._scores, attempt=self._attempt)
        except (DtrainError, OSError) as error:
            _log.warning("old checkpoints could not be deleted; the next save tries again: %s", error)


def _plain_json(step: int, state: dict[str, Any]) -> str:
    """A copy of the state as it is now; refused at once where it is not JSON."""
    try:
        return json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"step {step}: the state holds what JSON can't ({error}). Keep finite numbers, strings, lists, dicts."
        ) from error


def _entries(shares: Sequence[Share], specs: Mapping[str, TensorSpec]) -> tuple[Entry, ...]:
    """Where each share lies: larger items first, so that every box is aligned without gaps."""
    entries, begin = [], 0
    for share in sorted(shares, key=lambda share: -item_bytes(specs[share.name].dtype)):
        spec = specs[share.name]
        end = begin + share.box.num_elements * item_bytes(spec.dtype)
        whole = share.box.shape == spec.shape
        entries.append(Entry(name=share.name, dtype=spec.dtype, box=share.box, begin=begin, end=end, whole=whole))
        begin = end
    return tuple(entries)


def _source(entry: Entry, spec: TensorSpec, local: Local) -> Tensor:
    """The part of this rank's tensors that an entry holds, as a view."""
    for box, tensor in local.get(entry.name, ()):
        common = box.intersect(entry.box)
        if common != entry.box:
            continue
        if tuple(tensor.shape) != box.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise CheckpointError(
                f"{entry.name}: its box is {spec.dtype} {list(box.shape)}, but the tensor is "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        return tensor.detach()[entry.box.relative_to(box)]
    raise CheckpointError(
        f"{entry.name}: this rank is to write {list(entry.box.shape)} at {list(entry.box.offsets)}, "
        "but does not hold it"
    )


def _file_info(rank: int, message: dict[str, Any]) -> FileInfo:
    writer = names.writer_name(rank)
    return FileInfo(
        writer=rank,
        name=writer + names.DATA_SUFFIX,
        size_bytes=message["bytes"],
        index=writer + names.INDEX_SUFFIX,
        index_xxh3=message["index_xxh3"],
    )
