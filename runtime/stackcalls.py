"""The stacks of all ranks, for a person who asks: the question to every node, and what answers within a while."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping

from dtrain.runtime.roster import Message, Roster

_WAIT_S = 4.0
_POLL_S = 0.02
_MAX_CHARS = 4 << 20  # of one answer; a message has an end (runtime/control.py)


def shorten(texts: Mapping[str, str], max_chars: int) -> dict[str, str]:
    """The same with the middle of long texts left out, so that all of them together have about `max_chars`."""
    each = max_chars // max(1, len(texts))
    return {key: text if len(text) <= each else _ends(text, each // 2) for key, text in texts.items()}


def _ends(text: str, half: int) -> str:
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[len(text) - half :]}"


class StackCalls:
    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._answers: dict[int, dict[int, dict[str, str]]] = {}  # request -> node -> global rank -> text
        self._requests = itertools.count(1)

    def answer(self, node: int, message: Message) -> None:
        """One that comes after its question was given up is dropped."""
        if (answers := self._answers.get(int(message["id"]))) is not None:
            answers[node] = message["stacks"]

    async def collect(self) -> dict[str, str]:
        """By global rank; a rank whose node does not answer has its last progress record instead."""
        request = next(self._requests)
        answers = self._answers[request] = {}
        asked = set(self._roster.members)
        self._roster.broadcast({"op": "stack", "id": request})
        deadline = time.monotonic() + _WAIT_S
        while asked & self._roster.members.keys() - answers.keys() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        del self._answers[request]
        missing = {
            str(worker["global_rank"]): f"node {node} does not answer; last seen {worker}"
            for node, member in self._roster.members.items()
            if node not in answers
            for worker in member.workers
        }
        found = {rank: text for answer in answers.values() for rank, text in answer.items()}
        return shorten({**missing, **found}, _MAX_CHARS)
