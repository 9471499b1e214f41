"""N simulated nodes on this machine, each an agent in a session of its own that can be killed like a machine:
the kernel takes a dead agent's workers with it. Leaves joining, starting and restarting to the agents.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.agentcommand import AGENT
from dtrain.cluster.agents import agents
from dtrain.cluster.backends import Loss
from dtrain.cluster.interfaces import LOOPBACK, Interface, list_interfaces, pick
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.mirror import VARIABLE
from dtrain.cluster.nodescript import agent_argv, node_script
from dtrain.cluster.ports import PortRange
from dtrain.cluster.procs import Liveness, ProcessId, start_detached
from dtrain.cluster.rundir import Control, RunDir, read_json, write_atomic
from dtrain.cluster.scratch import sweep
from dtrain.cluster.unscheduled import Unscheduled
from dtrain.cluster.zygote import Zygote, ZygoteError

_DEATH_S = 2.0  # for a killed process to be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBackend(Unscheduled):
    agent_args: tuple[str, ...] = ()  # appended to each agent's command; see runtime/options.py

    def render(self, plan: JobPlan) -> str:
        lines = [f"# {plan.nodes} simulated node(s) on this machine, {plan.procs_per_node} worker(s) each"]
        lines.append(f"cd {shlex.quote(plan.cwd)}")
        if plan.setup:
            script = shlex.quote(str(_control(plan).script))
            lines.append(f"cat >{script} <<'END OF SCRIPT'\n{self._node_script(plan)}END OF SCRIPT")
        for node_rank in range(plan.nodes):
            words = [f"{key}={shlex.quote(value)}" for key, value in _devices(plan, node_rank, {}).items()]
            words += [shlex.quote(word) for word in self._command(plan, node_rank)]
            log = shlex.quote(str(RunDir(plan.run_dir).agent_log(node_rank)))
            lines.append(f"setsid {' '.join(words)} </dev/null >>{log} 2>&1 &")
        return "\n".join(lines) + "\n"

    def check(self, plan: JobPlan) -> None:
        pass

    def preload(self, plan: JobPlan) -> Zygote | None:
        # What `setup` changes, a process that was started before it would not know.
        return Zygote(plan) if plan.workers == "warm" and not plan.setup else None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        if plan.setup:
            write_atomic(_control(plan).script, self._node_script(plan), 0o600)
        for node_rank in range(plan.nodes):
            self._start(plan, node_rank, zygote)

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        self._start(plan, node_rank, None)
        return True

    def _start(self, plan: JobPlan, node_rank: int, zygote: Zygote | None) -> None:
        control = _control(plan)
        log = RunDir(plan.run_dir).agent_log(node_rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._set_aside(control, node_rank)
        devices = _devices(plan, node_rank, os.environ)
        argv = self._argv(plan, node_rank)
        process = _forked(zygote, argv, devices, log) if zygote else None
        if process is None:
            command = list(self._command(plan, node_rank))
            environ = {name: value for name, value in os.environ.items() if name != VARIABLE}  # a copy of its own
            process = start_detached(command, cwd=plan.cwd, environ={**environ, **devices}, log=log)
        # The agent writes the same record when it is up; written here too, so that it can be stopped before that.
        write_atomic(control.node(node_rank), json.dumps(process.to_json()), 0o600)

    def _set_aside(self, control: Control, node_rank: int) -> None:
        """Keeps the record of a process that still lives though it was given up: stopped, or starved."""
        record = read_json(control.node(node_rank))
        if record is not None and ProcessId.from_json(record).liveness() == "alive":
            write_atomic(control.path / f"superseded-{record['pid']}.json", json.dumps(record), 0o600)

    def clear(self, plan: JobPlan) -> None:
        for path in _control(plan).path.glob("superseded-*.json"):
            record = read_json(path)
            if record is not None:
                ProcessId.from_json(record).kill(signal.SIGKILL)

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        found = {process.liveness() for process in agents(plan)}
        if "alive" in found:
            return "alive"
        ended = _control(plan).ended.exists()
        return "unknown" if "unknown" in found and not ended else "gone"

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        return Loss(follows="nothing")

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return dict(environ)

    def stop(self, plan: JobPlan) -> None:
        for process in agents(plan):
            process.kill(signal.SIGTERM)

    def kill(self, plan: JobPlan) -> None:
        # Twice: an agent that was about to replace a dead node may have done so between our look and its death.
        for _ in range(2):
            for process in agents(plan):
                process.end_session()
        self.clear(plan)
        deadline = time.monotonic() + _DEATH_S
        while self.state(plan) == "alive" and time.monotonic() < deadline:
            time.sleep(0.01)
        sweep()  # they could not clean up themselves

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range

    def interface(self, plan: JobPlan) -> Interface:
        return LOOPBACK if plan.interface == "auto" else pick(plan.interface, list_interfaces())

    def _argv(self, plan: JobPlan, node_rank: int) -> tuple[str, ...]:
        return (*self._argv_but_rank(plan), str(node_rank))

    def _argv_but_rank(self, plan: JobPlan) -> tuple[str, ...]:
        return agent_argv(plan, self.agent_args)

    def _command(self, plan: JobPlan, node_rank: int) -> tuple[str, ...]:
        """Without `setup` nothing can have changed on this machine since the launch has looked at its Python."""
        return ("bash", str(_control(plan).script), str(node_rank)) if plan.setup else self._argv(plan, node_rank)

    def _node_script(self, plan: JobPlan) -> str:
        return node_script(plan, self._argv_but_rank(plan))


def _forked(zygote: Zygote, argv: tuple[str, ...], devices: dict[str, str], log: Path) -> ProcessId | None:
    """A node as a fork of the zygote, doing what `argv` says; None where that can't be."""
    arguments = list(argv[1 + len(AGENT) :])
    with open(log, "ab") as output:
        descriptor = output.fileno()
        try:
            pid = zygote.fork(
                "dtrain.runtime.zygote:node", arguments, stdout=descriptor, stderr=descriptor, environ=devices
            )
            return ProcessId.of(pid)
        except (ZygoteError, ProcessLookupError):
            return None


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _devices(plan: JobPlan, node_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """This node's slice of the machine's GPUs, out of those that the user made visible."""
    if plan.gpus_per_node == 0:
        return {}
    start = node_rank * plan.gpus_per_node
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(plan.nodes * plan.gpus_per_node)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[start : start + plan.gpus_per_node])}
