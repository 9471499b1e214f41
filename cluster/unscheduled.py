"""What back ends without a scheduler have in common: nothing waits in a queue, nothing restarts a job, and the agents
(cluster/agents.py) are all that there is of it."""

from __future__ import annotations

from dtrain.cluster.jobplan import JobPlan


class Unscheduled:
    """The part of a back end that a scheduler would have answers to. See cluster/backends.py."""

    __slots__ = ()

    @property
    def detaches(self) -> bool:
        return False

    def reason(self, plan: JobPlan) -> str:
        return ""

    def called(self, plan: JobPlan) -> str:
        return ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return False

    def hasten(self, plan: JobPlan) -> None:
        pass
