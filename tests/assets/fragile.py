"""The local back end with nodes that may be lost for good, as those of an allocation: one that has the file dead-K in
the run directory is never started again, and the job goes on with the others where they are enough. Run as a program
it is the agent of such a job."""

from __future__ import annotations

import sys
from pathlib import Path

from dtrain.cluster import backends
from dtrain.cluster.backends import Loss
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.local import LocalBackend

NAME = "fragile"


class FragileBackend(LocalBackend):
    def _argv_but_rank(self, plan: JobPlan) -> tuple[str, ...]:
        python, *_agent, _module = super()._argv_but_rank(plan)[:4]
        return (python, __file__, *super()._argv_but_rank(plan)[4:])

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        return not (Path(plan.run_dir) / f"dead-{node_rank}").exists() and super().start_node(plan, node_rank)

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        return Loss(follows="rest" if enough else "anew", note="" if enough else f" ({plan.why_not_fewer})")


backends._BACKENDS[NAME] = f"{__name__ if __name__ != '__main__' else 'fragile'}:FragileBackend"

if __name__ == "__main__":
    from dtrain.runtime import agent

    sys.exit(agent.main())
