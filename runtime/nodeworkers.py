"""A node's workers through its attempts: start all, watch, signal, end all. Decides nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import LOOPBACK, Interface
from dtrain.cluster.jobplan import JobPlan, worker_environ
from dtrain.cluster.procs import clear_session
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.secretrefs import secret_values
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.childproc import ENTRIES, WorkerSpec
from dtrain.runtime.codedir import CodeDir
from dtrain.runtime.nodelog import NodeLog
from dtrain.runtime.options import Options
from dtrain.runtime.redact import Redactor, redactor
from dtrain.runtime.warm import ExecStarter, Starter, StartError, WarmParent, WarmStarter, exec_warm_parent
from dtrain.runtime.workerproc import Notify, WorkerProcess

_STACK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOrder:
    """What the coordinator settles for one attempt."""

    attempt: int
    master_addr: str
    master_port: int
    resume_step: int
    resume_attempt: int
    nodes: tuple[int, ...]  # those that take part, in the order of their ranks

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> StartOrder:
        known = {name: message[name] for name in StartOrder.__dataclass_fields__}
        return StartOrder(**{**known, "nodes": tuple(known["nodes"])})


class NodeWorkers:
    """`notify` gets what workers tell and how they end, as messages for the coordinator without their attempt.
    `environ` is what the workers inherit; left out: this process's own."""

    def __init__(
        self,
        plan: JobPlan,
        options: Options,
        notify: Notify,
        warm: WarmParent | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        interface: Interface = LOOPBACK,
        code: CodeDir | None = None,
    ) -> None:
        self._plan = plan
        self._options = options
        self._notify = notify
        self._interface = interface
        self._code = code
        environ = os.environ if environ is None else environ
        self._environ = worker_environ(plan, dict(environ))
        self._workers: list[WorkerProcess] = []
        self._log: NodeLog | None = None
        self._warm: WarmStarter | None = None
        if plan.workers == "warm":
            self._warm = WarmStarter(warm) if warm else self._start_warm()
        self._cold = ExecStarter(plan.python, self._environ)
        self._note = ""  # why the workers were not started warm
        self._changing = asyncio.Lock()  # held while workers are started or ended
        self._killed = asyncio.Event()  # a start that is under way gives up
        self.reached = 0  # the furthest step that a worker of the newest attempt has worked on
        self.done = 0  # the furthest step that one has finished

    def _start_warm(self) -> WarmStarter:
        return WarmStarter(exec_warm_parent(self._plan.python, self._environ, self._options.preload))

    async def start(self, order: StartOrder, store: socket.socket | None) -> dict[str, Any]:
        """Starts all workers; what to tell the coordinator of it. Raises StartError, also when `kill` came between."""
        self._killed.clear()
        async with self._changing:
            started = time.monotonic()
            self.reached = self.done = 0
            self._note = ""
            redact = self._make_redactor()
            self._log = NodeLog(RunDir(self._plan.run_dir).log(order.attempt, self._options.node_rank))
            starter = await self._choose_starter()
            for local_rank in range(self._plan.procs_per_node):
                if self._killed.is_set():
                    raise StartError("ended while the workers were being started")
                worker = WorkerProcess(self._worker_env(order, local_rank), self._log, self._notify, redact)
                self._workers.append(worker)
                starter = await self._start_one(worker, starter, store)
            seconds = round(time.monotonic() - started, 3)
            return {"warm": starter is not self._cold, "seconds": seconds, "note": self._note}

    def _make_redactor(self) -> Redactor:
        """With the values that this attempt's workers see: files are read anew, because tokens get renewed."""
        try:
            values = secret_values(self._plan.secrets, self._environ)
        except UsageError as error:
            raise StartError(f"cluster.secrets: {error}") from error
        return redactor(values, self._code.places if self._code else None)

    async def _choose_starter(self) -> Starter:
        """The warm parent once it has imported what it should; the wait ends early when `kill` is called."""
        if self._warm is None:
            return self._cold
        if self._warm.dead:
            self._warm = self._start_warm()
        killed = asyncio.ensure_future(self._killed.wait())
        either: set[asyncio.Future[Any]] = {self._warm.ready, killed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        return self._warm

    async def _start_one(self, worker: WorkerProcess, starter: Starter, store: socket.socket | None) -> Starter:
        """Warm where that works, else plainly from this worker on; the starter for the next one."""
        code = self._code
        spec = WorkerSpec(
            entry=self._options.entry or ENTRIES[self._plan.kind],
            cwd=code.cwd(self._plan.cwd) if code else self._plan.cwd,
            sys_path=tuple(map(code.map, self._plan.sys_path)) if code else self._plan.sys_path,
            worker=worker.env.to_environ(),
            secrets=self._plan.secrets,
        )
        store_fd = store.fileno() if store is not None and worker.env.global_rank == 0 else -1
        try:
            await worker.start(starter, spec, store_fd)
        except StartError as error:
            if starter is self._cold:
                raise
            self._note = f"node {self._options.node_rank} starts its workers plainly: {error}"
            print(self._note, file=sys.stderr, flush=True)
            await worker.start(self._cold, spec, store_fd)
            return self._cold
        return starter

    def _worker_env(self, order: StartOrder, local_rank: int) -> WorkerEnv:
        plan = self._plan
        gpus = plan.gpus_per_node
        place = order.nodes.index(self._options.node_rank)  # among the nodes that are left
        return WorkerEnv(
            run_dir=str(RunDir(plan.run_dir).path),
            name=plan.name,
            job_id=plan.job_id,
            attempt=order.attempt,
            global_rank=place * plan.procs_per_node + local_rank,
            local_rank=local_rank,
            node_rank=place,
            world_size=len(order.nodes) * plan.procs_per_node,
            local_world_size=plan.procs_per_node,
            num_nodes=len(order.nodes),
            master_addr=order.master_addr,
            master_port=order.master_port,
            interface=self._interface.name,
            device=f"cuda:{local_rank % gpus}" if gpus else "cpu",
            resume_step=order.resume_step,
            resume_attempt=order.resume_attempt,
            max_restarts=plan.max_restarts_without_progress,
        )

    def progress(self) -> list[dict[str, Any]]:
        """One record a worker, as `status --json` shows them and a few fields more."""
        records = [worker.progress() for worker in self._workers]
        self.reached = max([self.reached, *(int(record["step"]) for record in records)])
        self.done = max([self.done, *(int(record["done"]) for record in records)])
        return records

    async def stacks(self) -> dict[str, str]:
        texts = await asyncio.gather(*(worker.stack(_STACK_TIMEOUT_S) for worker in self._workers))
        return {str(worker.env.global_rank): text for worker, text in zip(self._workers, texts, strict=True)}

    def terminate(self) -> None:
        """Asks the workers to save and end."""
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Ends the workers and all that they started; afterwards nothing of the attempt runs on this node."""
        self._killed.set()
        async with self._changing:
            await self._kill()

    async def _kill(self) -> None:
        for worker in self._workers:
            worker.signal(signal.SIGKILL)
        running = [worker.ended for worker in self._workers if worker.pid]
        if running:
            await asyncio.wait(running, timeout=self._options.timings.kill_s)
        self.progress()
        if os.getsid(0) == os.getpid():
            warm = frozenset() if self._warm is None else frozenset({self._warm.pid})
            clear_session(os.getpid(), frozenset({os.getpid()}) | warm)
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        if self._log is not None:
            self._log.close()
            self._log = None

    async def close(self) -> None:
        await self.kill()
        if self._warm is not None:
            self._warm.close()
            self._warm = None
