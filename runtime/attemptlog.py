"""What became of one attempt's workers so far, from the messages of their nodes. Decides nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dtrain.cluster import exits
from dtrain.runtime.culprit import Fact, fact_of_exit, fact_of_report
from dtrain.runtime.decide import Outcome


@dataclass(slots=True, kw_only=True)
class AttemptLog:
    number: int
    nodes: tuple[int, ...]  # those that take part, in the order of their ranks
    world_size: int
    from_step: int = 0  # the step of the checkpoint that the attempt began with
    facts: list[Fact] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # of workers that ended by themselves
    started: dict[int, dict[str, Any]] = field(default_factory=dict)  # node -> how its workers were started
    gone: set[int] = field(default_factory=set)  # nodes on which nothing of the attempt runs any more
    reached: int = 0
    done: int = 0
    committed: int = 0
    slowest_save_s: float = 0.0
    stopped_early: str = ""

    def apply(self, node: int, message: dict[str, Any]) -> None:
        """Messages of other attempts, and of nodes that take no part, change nothing."""
        if node not in self.nodes:
            return
        op = message["op"]
        if op == "lost":
            self._lost(node, message)
        if message.get("attempt") != self.number:
            return
        self.reached = max(self.reached, int(message.get("reached", 0)), int(message.get("step", 0)))
        self.done = max(self.done, int(message.get("done", 0)))
        match op:
            case "started":
                self.started[node] = message
            case "start_failed":
                text = f"node {node} could not start its workers: {message['message']}"
                self.facts.append(Fact(kind="start", node=node, time=time.time(), message=text, phase="starting"))
            case "failure":
                self.facts.append(fact_of_report(node, int(message["global_rank"]), message["report"]))
            case "exited":
                self._exited(node, message)
            case "event" if message["event"].get("type") == "checkpoint_committed":
                self.committed = max(self.committed, int(message["event"].get("step", 0)))
                self.slowest_save_s = max(self.slowest_save_s, float(message["event"].get("seconds", 0.0)))
            case "event" if message["event"].get("type") == "stopped_early":
                self.stopped_early = str(message["event"].get("reason", ""))
            case "killed":
                self.gone.add(node)

    @property
    def failed(self) -> bool:
        return bool(self.facts)

    @property
    def over(self) -> bool:
        """Every worker has ended by itself."""
        return len(self.codes) == self.world_size

    def outcome(self, culprit: Fact | None) -> Outcome:
        return Outcome(
            reached=self.reached,
            done=self.done,
            from_step=self.from_step,
            committed=self.committed,
            codes=frozenset(self.codes.values()),
            culprit=culprit,
            stopped_early=self.stopped_early,
            nodes=len(self.nodes),
        )

    def _lost(self, node: int, message: dict[str, Any]) -> None:
        self.reached = max(self.reached, int(message.get("reached", 0)))
        self.done = max(self.done, self.reached - 1)  # at least; what it finished last nobody can say
        if node not in self.gone:
            text = f"node {node} was lost: {message['reason']}"
            self.facts.append(Fact(kind="node_lost", node=node, time=time.time(), message=text, step=self.reached))
        self.gone.add(node)

    def _exited(self, node: int, message: dict[str, Any]) -> None:
        if message["killed"]:
            return
        rank = int(message["global_rank"])
        number, code = int(message["signal"]), int(message["code"])
        self.codes[rank] = code or (128 + number if number else 0)
        reported = any(fact.global_rank == rank for fact in self.facts)
        ended_well = code in (exits.DONE, exits.STOPPED) and message["left"] and not number
        if not ended_well and not reported:
            self.facts.append(fact_of_exit(node, message, exits.NEVER_RETRY))
