"""What every engine that starts nodes must offer, and the table of those that exist.

A back end is one file and one line of the table. It renders a JobPlan into the exact commands, starts them, and says
what became of them; what the nodes then do among themselves is the agents' affair.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import Interface
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ports import PortRange
from dtrain.cluster.procs import Liveness
from dtrain.cluster.zygote import Zygote

NODE_FAILURES = 2  # of one node, after which a job had better do without it: in a row, or over the job's starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What follows from a node that the job has to do without. replaced: the same node is being started on another
    machine; rest: the others go on, in the same job; anew: the job ends, and is started anew without it; wait: the
    engine still tries to give it; nothing: there is no other way."""

    follows: Literal["replaced", "rest", "anew", "wait", "nothing"]
    note: str = ""  # for the person


def too_few(plan: JobPlan) -> str:
    """The note of a loss that leaves a job with fewer nodes than its strategy can do with."""
    return f" (with fewer nodes it can't go on: {plan.why_not_fewer.rstrip('.')})" if plan.why_not_fewer else ""


class Backend(Protocol):
    @property
    def detaches(self) -> bool:
        """Whether Ctrl-C in a follower leaves the run alone, which a scheduler keeps; else it saves and ends it."""

    def render(self, plan: JobPlan) -> str:
        """The commands that `submit` runs, one a node. Pure: equal plans give equal text."""

    def check(self, plan: JobPlan) -> None:
        """Before anything is written: raises UsageError for what the engine is known not to give."""

    def preload(self, plan: JobPlan) -> Zygote | None:
        """A process on this machine from which nodes may be forked, where that saves time; nothing of the job yet."""

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        """Starts the agents, which outlive the caller; returns at once.

        The caller has written config.yaml, job.json and control/<job_id>/token. `zygote` is what `preload` gave.
        """

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        """Whether any agent lives, or may still be started by a scheduler that has the job. Unknown where they were
        started from another host, and while a scheduler does not answer. `max_age_s`: an answer that old will do, so
        that many followers ask a scheduler rarely."""

    def reason(self, plan: JobPlan) -> str:
        """Why it is not running, in the scheduler's words, from what `state` has found; "" where nothing is to say."""

    def called(self, plan: JobPlan) -> str:
        """What the scheduler calls the job, like "Slurm job 1234"; "" where there is none."""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        """Whether a job that stopped (85) may be started again under the same job id, without a person."""

    def hasten(self, plan: JobPlan) -> None:
        """Called for those who follow the run or launch it again: releases a restart that is only held for a while."""

    def stop(self, plan: JobPlan) -> None:
        """Asks the agents to save and end."""

    def kill(self, plan: JobPlan) -> None:
        """Ends every node of the job now, saving nothing."""

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        """Starts a node in a dead one's place; False where this engine can't or leaves it to its scheduler."""

    def clear(self, plan: JobPlan) -> None:
        """Ends what is left of nodes in whose place others were started: a frozen node may wake up much later."""

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """The node can't be had again inside the job, or is `alive` and fails again and again. `enough`: the strategy
        can run on the others."""

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What workers may inherit of their agent's environment."""

    def ports(self, plan: JobPlan) -> PortRange | None:
        """Those to listen on, first and last, on the calling node; None: any free one."""

    def interface(self, plan: JobPlan) -> Interface:
        """The one, of the calling node, at which the other nodes reach it. Raises UsageError."""


IN_ALLOCATION = "slurm-allocation"  # `launch` inside of one; no config names it
_BACKENDS = {
    "local": "dtrain.cluster.local:LocalBackend",
    "slurm": "dtrain.slurm.batch:BatchBackend",
    "ray": "dtrain.cluster.ray.backend:RayBackend",
    "ssh": "dtrain.cluster.ssh:SshBackend",
    "mpi": "dtrain.cluster.mpi:MpiBackend",
    "kubernetes": "dtrain.cluster.kubernetes.backend:KubernetesBackend",
    IN_ALLOCATION: "dtrain.slurm.allocation:AllocationBackend",
}


def get_backend(name: str, agent_args: tuple[str, ...] = ()) -> Backend:
    """`agent_args` go to every agent that it starts. Raises UsageError for a name that is not in the table."""
    if name not in _BACKENDS:
        near = difflib.get_close_matches(name, _BACKENDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"cluster.backend: there is no back end {name!r}.{hint} Known: {', '.join(sorted(_BACKENDS))}."
        )
    module, _, attribute = _BACKENDS[name].partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute)(agent_args=agent_args))
