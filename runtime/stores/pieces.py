"""Hands an upload's pieces from the thread that makes them to the one that sends them.

obstore must not be called from inside an iterator that it draws on, and who makes the pieces may well be reading them
from a store. At most QUEUED pieces wait, and as they are views nothing is copied.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

QUEUED = 4
_LOOK_S = 0.1  # how soon it is seen that the sender has failed


class Broken(Exception):
    """Ends the sender where the pieces come to a bad end."""


def send_pieces(data: Iterable[memoryview], most: int, send: Callable[[Iterator[memoryview]], None]) -> None:
    """Calls `send` with the pieces of `data`, of at most `most` bytes each, and raises what it raises. What `data`
    raises comes out after `send` has ended."""
    pieces: queue.Queue[memoryview | Broken | None] = queue.Queue(QUEUED)
    with ThreadPoolExecutor(1, thread_name_prefix="storage-send") as pool:
        sending = pool.submit(send, _drawn_from(pieces))
        try:
            for piece in _cut(data, most):
                if not _hand_over(pieces, piece, sending):
                    break
            _hand_over(pieces, None, sending)
        except BaseException:
            _hand_over(pieces, Broken(), sending)
            raise
        sending.result()


def _cut(data: Iterable[memoryview], most: int) -> Iterator[memoryview]:
    for part in data:
        view = part.cast("B")
        for begin in range(0, view.nbytes, most):
            yield view[begin : begin + most]


def _drawn_from(pieces: queue.Queue[memoryview | Broken | None]) -> Iterator[memoryview]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, Broken):
            raise piece
        yield piece


def _hand_over(
    pieces: queue.Queue[memoryview | Broken | None], piece: memoryview | Broken | None, sending: Future[None]
) -> bool:
    """False where nobody takes it any more."""
    while not sending.done():
        try:
            pieces.put(piece, timeout=_LOOK_S)
        except queue.Full:
            continue
        return True
    return False
