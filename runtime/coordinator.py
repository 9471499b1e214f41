"""The one place where a job's decisions are made: gather the nodes, begin an attempt, watch it, decide, end.

It lives inside the agent that won control/<job_id>/coordinator-<term>.json. Before each decision it makes sure that no
later term exists; one that finds a later term stops deciding. What to decide is runtime/decide.py's, who is to blame
runtime/culprit.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.backends import Backend
from dtrain.cluster.interfaces import Interface
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, append_event, look_again, read_json, write_atomic, write_once
from dtrain.runtime.attemptlog import AttemptLog
from dtrain.runtime.background import in_background
from dtrain.runtime.checkpoint.attempts import Attempt
from dtrain.runtime.control import CoordinatorAddress, find_coordinator, is_there, newest_incarnation
from dtrain.runtime.culprit import Fact, describe, find_culprit
from dtrain.runtime.decide import Decision, Memory, decide, given_up, stopped
from dtrain.runtime.jobstatus import JobStatus
from dtrain.runtime.options import Timings
from dtrain.runtime.roster import NOBODY, Message, Roster
from dtrain.runtime.stackcalls import StackCalls
from dtrain.runtime.team import Team

_POLL_S = 0.05
_GONE_LOOKS = 3  # a file system may miss a file once

# (the checkpoints to pass over, whether the beginning will do) -> the next attempt
Claim = Callable[[frozenset[tuple[int, int]], bool], Attempt]


class Deposed(Exception):
    """A later term exists, or the run was removed: this coordinator decides nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a coordinator is given."""

    plan: JobPlan
    backend: Backend
    interface: Interface  # of this node
    token: bytes
    timings: Timings
    claim: Claim
    incarnation: int = 0


class Coordinator:
    def __init__(self, job: Job, term: int) -> None:
        self._job = job
        self._plan = job.plan
        self._run = RunDir(job.plan.run_dir)
        self._control = self._run.control(job.plan.job_id)
        self._term = term
        stored = read_json(self._control.path / "memory.json")
        self._memory = Memory() if stored is None else Memory.from_json(stored)
        self._roster = Roster(
            self._control, job.token, job.plan.nodes, job.timings, self._answer_client, incarnation=job.incarnation
        )
        self._status = JobStatus(job.plan, self._control, self._roster.members)
        self._team = Team(job.plan, job.backend, self._control, job.timings, self._roster)
        self._stop_counts: dict[int, int] = {}
        self._node = NOBODY  # where this runs
        self._stacks = StackCalls(self._roster)

    async def open(self, node_rank: int, host: str) -> CoordinatorAddress:
        """Opens the control port, for the record that claims the term."""
        self._node = node_rank
        address = self._job.interface.address
        port = await self._roster.open(address, self._plan.port_range)
        return CoordinatorAddress(
            term=self._term,
            node_rank=node_rank,
            host=host,
            addr=address,
            port=port,
            pid=os.getpid(),
            incarnation=self._job.incarnation,
        )

    async def close(self) -> None:
        await self._roster.close()

    async def run(self) -> None:
        """Until the job has ended or another coordinator has taken over. Raises nothing."""
        status = asyncio.create_task(self._keep_status())
        try:
            decision = await self._lead()
            await self._end(decision)
        except Deposed as notice:
            _say(f"coordinator of term {self._term}: {notice}")
        except Exception as error:
            _say(traceback.format_exc())
            with contextlib.suppress(Deposed, OSError):
                await self._end(given_up(self._memory, error))
        finally:
            status.cancel()
            await self.close()

    async def _lead(self) -> Decision:
        """The job from here to its end, as a sequence of attempts."""
        decision = await self._settle_interrupted() if self._memory.running else None
        while decision is None or decision.state is None:
            impossible = await self._gather()
            if self._memory.stop is not None:
                return stopped(self._memory)
            if impossible is not None:
                return impossible
            attempt = await self._begin()
            if attempt is None:
                return stopped(self._memory)
            log = await self._watch(attempt)
            decision = self._conclude(log)
            if decision.give_up is not None:
                decision = await self._do_without(decision.give_up, decision.reason, alive=True) or decision
        return decision

    async def _settle_interrupted(self) -> Decision:
        """An attempt whose coordinator was lost; its nodes have ended their workers already."""
        previous = read_json(self._control.coordinator(self._term - 1)) or {}
        log = self._new_log(self._memory.attempt)
        deadline = time.monotonic() + self._job.timings.evidence_s
        while (left := deadline - time.monotonic()) > 0:
            await self._next(left)
        log.reached = max((member.reached for member in self._roster.members.values()), default=0)
        log.done = log.reached - 1
        node = int(previous.get("node_rank", 0))
        text = f"node {node}, which coordinated the job, was lost"
        log.facts.append(Fact(kind="node_lost", node=node, time=time.time(), message=text, step=log.reached))
        self._event("node_lost", node=node, reason=text)
        return self._conclude(log)

    async def _gather(self) -> Decision | None:
        """Waits until every node is here, replacing those that are not; how the job ends where one can't be had and the
        others are not enough."""
        while not self._team.is_complete or not self._roster.inbox.empty():
            if self._memory.stop is not None:
                return None
            if self._control.ended.exists():
                return self._failed("a node that can't take part has ended the job")  # its own words stay in that file
            await self._next(0.05)
            due = self._team.due(first=self._memory.attempt == 0)
            if due:
                self._check_term()
            problems = await asyncio.gather(*map(self._team.start_again, due))
            for node, problem in zip(due, problems, strict=True):  # one by one: with each there are fewer left
                if (
                    problem
                    and node not in self._roster.members
                    and (end := await self._do_without(node, problem, alive=False))
                ):
                    return end
        return None

    async def _do_without(self, node: int, problem: str, *, alive: bool) -> Decision | None:
        """How the job ends; None where it goes on. `alive`: a node that is there, but spoils every attempt."""
        loss = await self._team.lose(node, problem, alive=alive)
        self._check_term()
        reason = f"{problem}{loss.note}"
        match loss.follows:
            case "replaced":
                self._team.drop(node, reason)
                self._event("node_replaced", node=node, reason=reason)
                self._depose_if_own(node, "has another machine now")
            case "rest":
                await self._leave_out(node, reason)
            case "anew":
                reason = f"{reason}; the job is started anew without it"
                return Decision(memory=self._memory, state="stopped", exit_code=exits.STOPPED, reason=reason)
            case "wait":
                self._team.wait_for(node)
            case "nothing" if self._team.is_exhausted(node):
                return self._failed(reason)
        return None

    async def _leave_out(self, node: int, reason: str) -> None:
        await self._team.leave_out(node, reason)
        self._status.look_for_losses()
        count, spare = len(self._team.ranks), self._team.spare
        self._event("node_left_out", node=node, reason=reason, nodes=count, nodes_asked=self._plan.nodes, spare=spare)
        self._depose_if_own(node, "is left out")

    def _depose_if_own(self, node: int, why: str) -> None:
        if node == self._node:
            raise Deposed(f"node {node}, which coordinated the job, {why}")

    def _failed(self, reason: str) -> Decision:
        return Decision(memory=self._memory, state="failed", exit_code=exits.FAILED, reason=reason)

    async def _begin(self) -> Attempt | None:
        """Takes the next attempt number and tells the node of global rank 0 to open the attempt's store. None where the
        job is to stop and the checkpoint store has not answered: a number taken after that is of no consequence."""
        self._check_term()
        skip = frozenset(self._memory.skip)
        # What was committed once must not be forgotten in silence: then a person has to look.
        from_nothing = not skip and not self._memory.committed
        claiming = in_background(lambda: self._job.claim(skip, from_nothing))
        while not (await asyncio.wait({claiming}, timeout=_POLL_S))[0]:
            while await self._next(0) is not None:
                pass
            if self._memory.stop is not None:
                return None
        attempt = claiming.result()
        self._check_term()
        self._remember(replace(self._memory, attempt=attempt.number, running=True))
        team = self._team.ranks
        self._status.begin(attempt, len(team))
        origin = {"step": attempt.from_step, "attempt": attempt.from_attempt} if attempt.from_step else None
        self._event(
            "attempt_started",
            attempt=attempt.number,
            world_size=len(team) * self._plan.procs_per_node,
            nodes=len(team),
            nodes_asked=self._plan.nodes,
            node_ranks=team,
            **{"from": origin},
        )
        self._roster.send(team[0], {"op": "bind", "attempt": attempt.number})
        return attempt

    async def _watch(self, attempt: Attempt) -> AttemptLog:
        """From the open store to the end of all workers, by themselves or by our hand."""
        log = self._new_log(attempt.number, attempt.from_step)
        for node in set(log.nodes) - self._roster.members.keys():
            log.apply(node, {"op": "lost", "reason": "it left while the attempt was being prepared"})
        begun, decide_at, stop_at = False, float("inf"), float("inf")
        while not log.over:
            now = time.monotonic()
            if log.failed:
                decide_at = min(decide_at, now + self._job.timings.evidence_s)
            if (self._memory.stop is not None or exits.STOPPED in log.codes.values()) and stop_at == float("inf"):
                stop_at = now + max(self._job.timings.stop_s, 3 * log.slowest_save_s + 15.0)
                if not begun:
                    break
                self._roster.broadcast({"op": "stop", "attempt": attempt.number})
            if now >= min(decide_at, stop_at) or max(self._stop_counts.values(), default=0) > 1:
                break
            received = await self._next(min(decide_at, stop_at) - now)
            if received is None:
                continue
            node, message = received
            log.apply(node, message)
            if message.get("op") == "bound" and message.get("attempt") == attempt.number:
                self._start_workers(attempt, log.nodes, message)
                begun = True
            if message.get("op") == "started" and len(log.started) == len(log.nodes):
                self._announce_workers(log)
        await self._kill_workers(log)
        return log

    def _start_workers(self, attempt: Attempt, team: tuple[int, ...], bound: Message) -> None:
        self._check_term()
        order = {
            "op": "start",
            "attempt": attempt.number,
            "master_addr": bound["addr"],
            "master_port": bound["port"],
            "resume_step": attempt.from_step,
            "resume_attempt": attempt.from_attempt,
            "nodes": team,
        }
        for node in team:
            self._roster.send(node, order)

    def _announce_workers(self, log: AttemptLog) -> None:
        self._status.state = "running"
        seconds = max(float(message["seconds"]) for message in log.started.values())
        warm = all(bool(message["warm"]) for message in log.started.values())
        note = "; ".join(sorted({str(message["note"]) for message in log.started.values() if message["note"]}))
        self._event("workers_started", attempt=log.number, warm=warm, seconds=seconds, note=note)

    async def _kill_workers(self, log: AttemptLog) -> None:
        """Afterwards nothing of the attempt runs on any node that is still here."""
        self._roster.broadcast({"op": "kill", "attempt": log.number})
        deadline = time.monotonic() + 2 * self._job.timings.kill_s
        while waiting := (self._roster.members.keys() & set(log.nodes)) - log.gone:
            received = await self._next(deadline - time.monotonic())
            if received is not None:
                log.apply(*received)
            elif time.monotonic() >= deadline:
                for node in waiting:
                    self._roster.drop(node, "it did not end its workers")

    def _conclude(self, log: AttemptLog) -> Decision:
        """Names the culprit and decides."""
        self._check_term()
        self._status.finish_attempt(log.done)
        culprit = find_culprit(log.facts) if log.facts else None
        decision = decide(
            self._memory,
            log.outcome(culprit),
            self._plan.max_restarts_without_progress,
            script=self._plan.kind == "script",
        )
        if culprit is not None and (self._memory.stop is None or decision.exit_code == exits.NEVER_RETRY):
            failure = describe(culprit, log.number, range(log.world_size)).to_json()
            self._try(lambda: write_atomic(self._run.failure, json.dumps(failure, indent=1)))
            self._event("failure", **failure)
        for step, attempt in set(decision.memory.skip) - set(self._memory.skip):
            message = "" if culprit is None else culprit.message
            self._event("checkpoint_passed_over", step=step, attempt=attempt, message=message)
        self._remember(decision.memory)
        if decision.state is None:
            self._status.state = "running"
            self._event("restart", attempt=log.number, reason=decision.reason)
        return decision

    async def _end(self, decision: Decision) -> None:
        """Puts the job's last word, tells every node, and waits until they have hung up."""
        self._check_term()
        step = self._status.step
        record = {
            "state": decision.state,
            "exit_code": decision.exit_code,
            "reason": decision.reason,
            "step": step,
            "at": round(time.time(), 3),
        }
        if await in_background(lambda: write_once(self._control.ended, json.dumps(record), 0o600)):
            event = {key: record[key] for key in ("state", "exit_code", "reason", "step")}
            self._event("ended", **event)
        else:
            record = read_json(self._control.ended) or record
        self._status.end(str(record["state"]), str(record["reason"]))
        await self._save_status()
        self._roster.broadcast({"op": "end", "exit_code": record["exit_code"]})
        deadline = time.monotonic() + 2 * self._job.timings.kill_s
        while self._roster.members and (left := deadline - time.monotonic()) > 0:
            received = await self._next(left, ended=True)
            if received is not None and received[1].get("op") == "joined":  # it came while we were ending
                self._roster.send(received[0], {"op": "end", "exit_code": record["exit_code"]})
        await in_background(lambda: self._job.backend.clear(self._plan))

    async def _next(self, timeout_s: float, *, ended: bool = False) -> tuple[int, Message] | None:
        """The next message, after what concerns the whole job in it was done; None when none came in time."""
        timeout = None if timeout_s == float("inf") else max(0.0, timeout_s)
        try:
            if self._roster.inbox.empty():
                node, message = await asyncio.wait_for(self._roster.inbox.get(), timeout)
            else:
                node, message = self._roster.inbox.get_nowait()  # also where no time is left
        except TimeoutError:
            return None
        match message.get("op"):
            case "deposed" if not ended:
                self._check_term()
            case "joined":
                self._team.joined(node)
                self._event("node_joined", node=node, host=message["host"])
            case "lost" if not ended:
                self._event("node_lost", node=node, reason=message["reason"])
            case "event":
                self._worker_event(message)
            case "stop_requested":
                await in_background(lambda: look_again(self._control.path))  # whether it is a person's last word
                self._stop_requested(node, message)
            case "stacks":
                self._stacks.answer(node, message)
        return node, message

    def _worker_event(self, message: Message) -> None:
        fields = {str(key): value for key, value in message["event"].items()}
        kind = str(fields.pop("type", "unknown"))
        if kind == "checkpoint_committed":
            self._status.checkpoint = int(fields.get("step", 0))
        self._event(kind, **fields)

    def _stop_requested(self, node: int, message: Message) -> None:
        self._stop_counts[node] = int(message.get("count", 1))
        cancelled = self._control.cancel.exists()
        if self._memory.stop is None or (cancelled and self._memory.stop == "stop"):
            self._remember(replace(self._memory, stop="cancel" if cancelled else "stop"))
            self._status.state = "stopping"
            self._event("stopping", reason="cancelled by a person" if cancelled else str(message["reason"]))

    def _look_for_stop(self) -> None:
        """What a back end's driver has put down, which may not know where this port is."""
        stop = self._control.stop(self._job.incarnation)
        if self._memory.stop is None and stop.exists():
            with contextlib.suppress(OSError):
                message = {"op": "stop_requested", "reason": stop.read_text()}
                self._roster.inbox.put_nowait((NOBODY, message))

    async def _answer_client(self, message: Message) -> Message:
        match message.get("op"):
            case "status":
                return {"status": self._status.compose()}
            case "stop":
                self._roster.inbox.put_nowait((NOBODY, {"op": "stop_requested", "reason": "asked for by a person"}))
                return {"stopping": True}
            case "stack":
                return {"stacks": await self._stacks.collect()}
            case other:
                return {"error": f"there is no request {other!r}; known: stop, stack, status"}

    async def _keep_status(self) -> None:
        missing = 0
        while True:
            await self._save_status()
            self._look_for_stop()
            missing = 0 if is_there(self._control) else missing + 1
            if self._is_deposed() or missing >= _GONE_LOOKS:
                self._roster.inbox.put_nowait((NOBODY, {"op": "deposed"}))
            await asyncio.sleep(self._job.timings.heartbeat_s)

    async def _save_status(self) -> None:
        try:
            await self._status.save()
        except OSError as error:
            _say_unwritten(error)

    def _new_log(self, number: int, from_step: int = 0) -> AttemptLog:
        team = self._team.ranks
        world_size = len(team) * self._plan.procs_per_node
        return AttemptLog(number=number, nodes=team, world_size=world_size, from_step=from_step)

    def _is_deposed(self) -> bool:
        newest = find_coordinator(self._control)
        later_term = newest is not None and newest.term > self._term
        return later_term or newest_incarnation(self._control) > self._job.incarnation

    def _check_term(self) -> None:
        if self._is_deposed():
            raise Deposed("another node coordinates the job now; this one decides nothing any more")
        if not is_there(self._control):
            raise Deposed(f"{self._control.path} is gone; there is nothing left to decide")

    def _remember(self, memory: Memory) -> None:
        self._memory = memory
        self._try(lambda: write_atomic(self._control.path / "memory.json", memory.to_json(), 0o600))

    def _event(self, kind: str, /, **fields: Any) -> None:
        self._try(lambda: append_event(self._run, kind, **fields))

    @staticmethod
    def _try(write: Callable[[], object]) -> None:
        """A full disk must not end a job that trains."""
        try:
            write()
        except OSError as error:
            _say_unwritten(error)


def _say_unwritten(error: OSError) -> None:
    _say(f"can't write: {error}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may lie on a full disk
        print(text, file=sys.stderr, flush=True)
