"""Work that may block (a store, a slow disk), beside an event loop that must keep its heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of `work`, which runs in a thread of its own. Work that never returns holds up nobody: neither who
    gives up waiting, nor the end of the process (asyncio's own threads are waited for)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(put: Callable[[Any], None], value: object) -> None:
        if not future.done():
            put(value)

    def run() -> None:
        put: Callable[[Any], None] = future.set_result
        value: object
        try:
            value = work()
        except BaseException as error:
            put, value = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed by now
            loop.call_soon_threadsafe(settle, put, value)

    threading.Thread(target=run, name="dtrain-background", daemon=True).start()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to look at it
    return future
