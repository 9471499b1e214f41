"""One process a node: joins the job's coordinator (or becomes it), starts and watches the node's workers, and takes
them along when it dies. Decides nothing but who coordinates.

    python -m dtrain.runtime.agent --run-dir DIR --job-id ID --node-rank K
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.backends import get_backend
from dtrain.cluster.devices import usable_cores
from dtrain.cluster.errors import DtrainError, NodeError, StorageError, UsageError
from dtrain.cluster.jobplan import JobPlan, with_threads, worker_environ
from dtrain.cluster.ports import listening_socket
from dtrain.cluster.procs import EARLY_STOP, STOP_SIGNALS, ProcessId, set_process_name, unblock_stops
from dtrain.cluster.rundir import RunDir, look_again, read_json, write_atomic, write_once
from dtrain.cluster.storage import open_storage
from dtrain.runtime.background import in_background
from dtrain.runtime.channel import Channel, connect
from dtrain.runtime.checkpoint.attempts import Attempt, claim_attempt
from dtrain.runtime.codedir import CodeDir, unpack_code
from dtrain.runtime.control import ControlError, find_coordinator, is_there, newest_incarnation, read_token
from dtrain.runtime.coordinator import Coordinator, Job
from dtrain.runtime.cpus import describe, slice_of_cores
from dtrain.runtime.mirroring import Mirroring
from dtrain.runtime.nodestart import give_up, refuse_missing_secrets, refuse_other_version
from dtrain.runtime.nodeworkers import NodeWorkers, StartOrder
from dtrain.runtime.options import Options, parse_options
from dtrain.runtime.stackcalls import shorten
from dtrain.runtime.warm import StartError, WarmParent

Message = dict[str, Any]
_POLL_S = 0.05
_MAX_STACK_CHARS = 1 << 20  # of a node
_FLUSH_S = 6.0  # a store that is away must not look like a node that is
_GONE_LOOKS = 3  # a file system may miss a file once


class Agent:
    def __init__(
        self,
        job: Job,
        options: Options,
        warm: WarmParent | None = None,
        code: CodeDir | None = None,
        mirroring: Mirroring | None = None,
    ) -> None:
        self._mirroring = mirroring or Mirroring(options)
        self._job = job
        self._options = options
        self._timings = options.timings
        self._control = RunDir(options.run_dir).control(options.job_id)
        self._process = ProcessId.of(os.getpid())
        self._channel: Channel | None = None
        self._coordinator: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        environ = job.backend.worker_environ(dict(os.environ))
        self._workers = NodeWorkers(
            job.plan, options, self._tell, warm, environ=environ, interface=job.interface, code=code
        )
        self._stacking: set[asyncio.Task[None]] = set()
        self._store: socket.socket | None = None  # for global rank 0
        self._attempt = 0
        self._killed = 0  # the newest attempt that was ended
        self._heard_at = 0.0
        self._out_of_reach = (0, 0.0)  # the term of a coordinator, and since when it can't be reached
        self._stop_count = 0
        self._stop_workers = False  # a stop that came while the workers were being started

    async def run(self) -> int:
        """The exit code of the job, or 1 for a node in whose place another was started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, *STOP_SIGNALS):
            loop.add_signal_handler(number, self._stop_signal, number)
        unblock_stops()
        if came := os.environ.pop(EARLY_STOP, None):
            self._stop_signal(signal.Signals[came])
        watch = asyncio.create_task(self._watch_control())
        try:
            return await self._take_part()
        except FileNotFoundError:
            if is_there(self._control):
                raise
            _say(self._gone)
            return exits.FAILED
        finally:
            watch.cancel()
            await self._workers.close()
            if self._channel is not None:
                await self._channel.drain(1.0)
                self._channel.close()
            if self._coordinator is not None:
                await self._coordinator

    async def _take_part(self) -> int:
        await self._register()
        await self._flush()
        while self._is_mine():
            ended = read_json(self._control.ended)
            if ended is not None:
                return int(ended["exit_code"])
            channel = await self._join()
            if channel is None:
                continue
            code = await self._serve(channel)
            await self._workers.kill()
            if code is not None:
                return code
        _say(self._superseded if is_there(self._control) else self._gone)
        return exits.FAILED

    async def _flush(self) -> None:
        await in_background(lambda: self._mirroring.flush(_FLUSH_S))

    async def _watch_control(self) -> None:
        """Hangs up when the run directory is removed under the job: nobody could find its processes any more; and when
        the job was started anew somewhere else."""
        missing = 0
        while missing < _GONE_LOOKS:
            await asyncio.sleep(self._timings.heartbeat_s)
            missing = 0 if is_there(self._control) else missing + 1
            if self._is_outdated():
                break
        if self._channel is not None:
            self._channel.abort()

    async def _register(self) -> None:
        """Puts this process down as the node's, unless another living process stays put down.

        Who starts an agent in a dead one's place may register it a moment after it began to run.
        """
        deadline = time.monotonic() + self._timings.handshake_s
        while not (self._is_mine() or self._is_outdated() or self._is_left_out()):
            record = read_json(self._control.node(self._options.node_rank))
            if record is None or ProcessId.from_json(record).liveness() != "alive":
                text = json.dumps(self._process.to_json())
                write_atomic(self._control.node(self._options.node_rank), text, 0o600)
            elif time.monotonic() > deadline:
                return
            else:
                await asyncio.sleep(_POLL_S)

    def _is_outdated(self) -> bool:
        return newest_incarnation(self._control) > self._options.incarnation

    def _is_left_out(self) -> bool:
        return self._control.without(self._options.node_rank).exists()

    def _is_mine(self) -> bool:
        record = read_json(self._control.node(self._options.node_rank))
        mine = record is not None and ProcessId.from_json(record) == self._process
        return mine and not self._is_outdated() and not self._is_left_out()

    @property
    def _superseded(self) -> str:
        if self._is_left_out():
            return f"the job goes on without node {self._options.node_rank}; this process ends"
        if self._is_outdated():
            return f"the job was started anew; node {self._options.node_rank} of its earlier start ends"
        return f"another process serves node {self._options.node_rank} now; this one ends"

    @property
    def _gone(self) -> str:
        return f"{self._control.path} is gone; node {self._options.node_rank} ends, and its workers with it"

    async def _join(self) -> Channel | None:
        """A connection to the newest term's coordinator, which may be our own; None when there is nothing to join."""
        while self._is_mine() and not self._control.ended.exists():
            address = find_coordinator(self._control)
            term = 0 if address is None else address.term
            if address is not None and address.incarnation == self._options.incarnation:
                try:
                    return await self._introduce(await self._dial(address.addr, address.port))
                except ControlError as error:
                    _say(f"term {term}: {error}")
                except ConnectionRefusedError:
                    pass  # it is gone
                except (OSError, TimeoutError):
                    if await self._is_cut_off(term):
                        continue
            # Low ranks first; whoever finds that another was faster joins that one.
            await asyncio.sleep(self._timings.claim_delay_s * self._options.node_rank)
            newest = find_coordinator(self._control)
            unchanged = (0 if newest is None else newest.term) == term and not self._control.ended.exists()
            if unchanged and self._is_mine():  # and not refused because the job goes on without this node
                await self._claim(term + 1)
        return None

    async def _is_cut_off(self, term: int) -> bool:
        """Whether a coordinator that can't be reached is at work all the same, which the file system tells. As a rule
        this node is the one that is cut off then, and will be replaced. Not for ever: it may be the coordinator."""
        if self._out_of_reach[0] != term:
            self._out_of_reach = (term, time.monotonic())
        if time.monotonic() - self._out_of_reach[1] > 3 * self._timings.dead_after_s:
            return False
        before = read_json(self._control.status)
        await asyncio.sleep(2 * self._timings.heartbeat_s)
        return read_json(self._control.status) != before

    async def _dial(self, addr: str, port: int) -> Channel:
        return await connect(addr, port, self._job.token, self._timings.handshake_s)

    async def _introduce(self, channel: Channel) -> Channel:
        """Raises ControlError where the coordinator does not want this node."""
        hello = {
            "op": "hello",
            "node_rank": self._options.node_rank,
            "process": self._process.to_json(),
            "reached": self._workers.reached,
            "incarnation": self._options.incarnation,
        }
        channel.send(hello)
        answer = await asyncio.wait_for(channel.receive(), self._timings.handshake_s)
        if answer is None or answer.get("op") != "welcome":
            channel.abort()
            raise ControlError(f"not admitted: {answer}")
        return channel

    async def _claim(self, term: int) -> None:
        """Becomes the coordinator of `term`, unless another node was faster."""
        await in_background(lambda: look_again(self._control.path))  # the newest of what the one before knew
        coordinator = Coordinator(self._job, term)
        try:
            address = await coordinator.open(self._options.node_rank, socket.gethostname())
        except UsageError as error:
            raise NodeError(str(error)) from error
        record = self._control.coordinator(term)
        if not await in_background(lambda: write_once(record, address.to_json(), 0o600)):
            await coordinator.close()
            return
        _say(f"node {self._options.node_rank} coordinates the job (term {term}, {address.addr}:{address.port})")
        if self._coordinator is not None:
            await self._coordinator  # of an older term: it has ended or is about to
        self._coordinator = asyncio.create_task(coordinator.run())

    async def _serve(self, channel: Channel) -> int | None:
        """Does what the coordinator says; the exit code when the job has ended, None when the connection is lost."""
        self._channel = channel
        self._heard_at = time.monotonic()
        if self._stop_count:
            self._tell_stop()
        orders: asyncio.Queue[Message] = asyncio.Queue()
        heartbeat = asyncio.create_task(self._keep_in_touch(channel))
        obeying = asyncio.create_task(self._obey_all(orders, channel))
        try:
            while (message := await channel.receive()) is not None:
                self._heard_at = time.monotonic()
                if message["op"] == "end":
                    return int(message["exit_code"])
                orders.put_nowait(message)
        except ControlError as error:
            _say(f"the coordinator does not keep to the protocol: {error}")
            channel.abort()
        finally:
            heartbeat.cancel()
            obeying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await obeying
        return None

    async def _obey_all(self, orders: asyncio.Queue[Message], channel: Channel) -> None:
        """In order, beside the reading: to end workers may take longer than the coordinator may be silent."""
        try:
            while True:
                await self._obey(await orders.get())
        except Exception:
            channel.abort()  # a node that listens and does nothing would be worse than none
            raise

    async def _obey(self, message: Message) -> None:
        match message["op"]:
            case "bind":
                self._bind(int(message["attempt"]))
            case "start":
                order = StartOrder.from_message(message)
                self._attempt, self._stop_workers = order.attempt, False
                self._starting = asyncio.create_task(self._start(order))
            case "stop":
                self._stop_workers = True
                self._workers.terminate()
            case "kill":
                self._killed = int(message.get("attempt", 0))
                await self._workers.kill()
                if self._starting is not None:
                    await asyncio.wait({self._starting})
                await self._flush()  # the end of the attempt may be told as soon as this is answered
                self._tell({"op": "killed", "reached": self._workers.reached, "done": self._workers.done})
                self._ping()
            case "stack":
                task = asyncio.create_task(self._send_stacks(int(message["id"])))
                self._stacking.add(task)
                task.add_done_callback(self._stacking.discard)
            case _:
                pass  # a ping: to have heard it is all

    def _bind(self, attempt: int) -> None:
        """Every attempt has a store of its own, behind a port that nobody else can take."""
        if self._store is not None:
            self._store.close()
            self._store = None
        self._attempt = attempt
        try:
            self._store = listening_socket(self._job.interface.address, self._job.plan.port_range)
        except (UsageError, OSError) as error:
            self._tell({"op": "start_failed", "message": f"no port for the attempt's store: {error}"})
            return
        addr, port = self._store.getsockname()[:2]
        self._tell({"op": "bound", "addr": addr, "port": port})

    async def _start(self, order: StartOrder) -> None:
        store, self._store = self._store, None
        try:
            if order.nodes[0] == self._options.node_rank:
                await in_background(self._mirroring.take_over)
                if self._killed >= order.attempt:
                    raise StartError("ended while its records were fetched")
            started = await self._workers.start(order, store)
        except (StartError, StorageError, OSError) as error:
            self._tell({"op": "start_failed", "message": str(error)})
        else:
            self._tell({"op": "started", **started})
            self._ping()
            if self._stop_workers:
                self._workers.terminate()
        finally:
            if store is not None:
                store.close()

    async def _send_stacks(self, request: int) -> None:
        stacks = shorten(await self._workers.stacks(), _MAX_STACK_CHARS)
        self._tell({"op": "stacks", "id": request, "stacks": stacks})

    async def _keep_in_touch(self, channel: Channel) -> None:
        """Heartbeats, and the end of a connection on which nothing was heard for too long."""
        looked_at = time.monotonic()
        while True:
            self._ping()
            await asyncio.sleep(self._timings.heartbeat_s)
            now = time.monotonic()
            if now - looked_at > self._timings.dead_after_s / 2:
                self._heard_at = now  # it was us who slept: what was said meanwhile waits to be read
            looked_at = now
            if now - self._heard_at > self._timings.dead_after_s:
                _say(f"nothing heard of the coordinator for {now - self._heard_at:.1f} s")
                channel.abort()
                return

    def _ping(self) -> None:
        self._tell({"op": "ping", "workers": self._workers.progress(), "reached": self._workers.reached})

    def _tell(self, message: Message) -> None:
        """To the coordinator; what is said while there is none concerns an attempt that is over."""
        if self._channel is not None:
            self._channel.send({**message, "attempt": self._attempt})

    def _stop_signal(self, number: signal.Signals) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and not self._job.backend.detaches:
            self._stop_count += 1  # by a person, who may lose patience; a scheduler repeats itself
        self._stop_count = max(1, self._stop_count)
        _say(f"{number.name}: asking the job to stop")
        self._tell_stop()

    def _tell_stop(self) -> None:
        reason = f"node {self._options.node_rank} was told to stop"
        self._tell({"op": "stop_requested", "reason": reason, "count": self._stop_count})


def main(argv: Sequence[str] | None = None, warm: WarmParent | None = None) -> int:
    """`warm`: where a parent of the workers is there already; left out: one is started."""
    options = parse_options(argv)
    set_process_name(f"dtrain node {options.node_rank}")
    if os.getsid(0) != os.getpid() and os.getpgrp() != os.getpid():
        os.setsid()  # all that the node runs is one session, which can be cleared
    try:
        mirroring = Mirroring(options)
        try:
            return _serve(options, warm, mirroring)
        finally:
            mirroring.close()
    except DtrainError as error:
        _say(str(error))
        return error.exit_code


def _serve(options: Options, warm: WarmParent | None, mirroring: Mirroring) -> int:
    try:
        job = _load_job(options)
        code = unpack_code(job.plan)
        try:
            return asyncio.run(_run(job, options, warm, code, mirroring))
        finally:
            if code is not None:
                code.held.close()
    except NodeError as error:
        _say(str(error))
        return give_up(options, str(error))


async def _run(job: Job, options: Options, warm: WarmParent | None, code: CodeDir | None, mirroring: Mirroring) -> int:
    plan = job.plan
    device = f"{plan.gpus_per_node} GPUs" if plan.gpus_per_node else "CPU"
    each = f"{plan.procs_per_node} workers x {plan.threads_per_proc} threads on {device}"
    where = f"interface {job.interface}, {_cores(plan, options.node_rank)}"
    _say(f"node {options.node_rank} of {plan.nodes}: {each}, {where}")
    return await Agent(job, options, warm, code, mirroring).run()


def _cores(plan: JobPlan, node_rank: int) -> str:
    """Like `cores 0-3 | 4-7`: each worker's own."""
    cores, environ = os.sched_getaffinity(0), worker_environ(plan, dict(os.environ))
    shape = (plan.nodes, plan.procs_per_node)
    each = [
        slice_of_cores(cores, environ, backend=plan.backend, node_rank=node_rank, local_rank=local_rank, shape=shape)
        for local_rank in range(plan.procs_per_node)
    ]
    return f"cores {' | '.join(map(describe, each))}" if all(each) else f"{len(cores)} cores for all workers"


def _load_job(options: Options) -> Job:
    """Raises DtrainError where the run directory holds another job by now, NodeError where this node can't serve it."""
    run = RunDir(options.run_dir)
    record = read_json(run.job)
    if record is None:
        raise DtrainError(f"{run.job}: no such file. Was the run directory removed?")
    plan = with_threads(JobPlan.from_json(record), usable_cores())
    if plan.job_id != options.job_id:
        raise DtrainError(f"{run.job} describes job {plan.job_id}; this node was started for {options.job_id}")
    refuse_other_version(plan)
    refuse_missing_secrets(plan, os.environ)
    backend = get_backend(plan.backend, options.agent_args)
    plan = replace(plan, port_range=backend.ports(plan))
    try:
        interface = backend.interface(plan)
    except UsageError as error:
        raise NodeError(f"cluster.interface: {error}") from error

    def claim(skip: frozenset[tuple[int, int]], from_nothing: bool) -> Attempt:
        storage = open_storage(plan.checkpoint_url)
        host = socket.gethostname()
        return claim_attempt(storage, host=host, job_id=plan.job_id, skip=skip, from_nothing=from_nothing)

    token = read_token(run.control(plan.job_id))
    return Job(
        plan=plan,
        backend=backend,
        interface=interface,
        token=token,
        timings=options.timings,
        claim=claim,
        incarnation=options.incarnation,
    )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk below the log must not end a job that trains
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
