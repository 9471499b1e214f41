"""The stacks of all ranks, for a person who asks: the question to every node, and what answers within a while."""

from __future__ import annotations

import asyncio
import itertools
import time

from dtrain.runtime.roster import Message, Roster

_WAIT_S = 4.0
_POLL_S = 0.02


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
        return {**missing, **{rank: text for answer in answers.values() for rank, text in answer.items()}}
