"""Back end `ray`: a Ray job, submitted under our job's id, whose keeper (cluster/ray/keeper.py) puts an agent on each
node. The run directory tells of it as long as it can; Ray is asked where it does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.cluster import exits
from dtrain.cluster.agents import agent_of
from dtrain.cluster.answers import LastAnswers
from dtrain.cluster.backends import Loss, too_few
from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import LOOPBACK, Interface, facing, is_loopback
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import agent_argv, registering_script
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness
from dtrain.cluster.ray.files import RayFiles
from dtrain.cluster.ray.jobs import Jobs, RayRefused, RayUnreachable
from dtrain.cluster.ray.node import ADDRESS
from dtrain.cluster.ray.resources import bundle
from dtrain.cluster.ray.sealed import new_key, seal
from dtrain.cluster.rundir import FRESH_S, put_end, tells_of_life, write_atomic, write_once
from dtrain.cluster.sshscript import exported
from dtrain.cluster.zygote import Zygote

_KEEPER_S = 60.0  # for Ray to start a keeper again whose node was lost
_ARRIVE_S = 15.0  # from a launch to its request's arrival
_KILL_S = 20.0
_START_S = 45.0  # for a node's agent to appear in a dead one's place
_POLL_S = 0.1

_asked: LastAnswers[tuple[Liveness, str]] = LastAnswers()  # with the reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RayBackend:
    agent_args: tuple[str, ...] = ()

    @property
    def detaches(self) -> bool:
        return True

    def render(self, plan: JobPlan) -> str:
        request = {
            "submission_id": plan.job_id,
            "entrypoint": _entrypoint(plan, "KEY"),
            "runtime_env": {},
            "metadata": _metadata(plan),
        }
        group = {"name": plan.job_id, "strategy": "STRICT_SPREAD", "bundles": [bundle(plan)] * plan.nodes}
        labels = {"bundle_label_selector": [plan.ray.labels] * plan.nodes} if plan.ray.labels else {}
        script = registering_script(plan, self.agent_args)
        return (
            f"# to the Jobs API of {plan.ray.address}; KEY opens the sealed environment in the run directory\n"
            f"{json.dumps(request, indent=2)}\n"
            f"# the placement group, an actor a bundle\n{json.dumps({**group, **labels}, indent=2)}\n"
            f"# what each actor starts: bash node.sh NODE_RANK\n"
            f"cat >{shlex.quote(str(RayFiles(plan).control.script))} <<'END OF SCRIPT'\n{script}END OF SCRIPT\n"
        )

    def check(self, plan: JobPlan) -> None:
        try:
            theirs = Jobs(plan.ray.address).version()
        except (RayUnreachable, RayRefused) as error:
            raise UsageError(
                f"cluster.ray.address: {plan.ray.address}: no Ray cluster answers there: {error}. Nothing was "
                "submitted. Give the address of its Jobs API, like http://head:8265, or start one: `ray start --head`."
            ) from error
        import ray

        if theirs != ray.__version__:
            raise UsageError(
                f"cluster.ray.address: {plan.ray.address} runs Ray {theirs}, and here is {ray.__version__}. Both must "
                f"be the same: pip install 'ray[default]=={theirs}'"
            )

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        files, key = RayFiles(plan), new_key()
        (files.run.path / "logs").mkdir(exist_ok=True)
        write_atomic(files.control.script, registering_script(plan, self.agent_args), 0o600)
        files.put_agent_argv(agent_argv(plan, self.agent_args))
        write_atomic(files.environ(key), seal(exported(os.environ), key), 0o600)
        write_atomic(files.intent, "", 0o600)
        jobs = Jobs(plan.ray.address)
        write_atomic(files.address, jobs.url, 0o600)
        try:
            jobs.submit(plan.job_id, _entrypoint(plan, key), _metadata(plan))
        except RayRefused as error:
            raise UsageError(f"Ray refused the job: {error}") from error
        except RayUnreachable as error:
            if self._ask(plan)[0] == "unknown":
                raise RayUnreachable(
                    f"whether Ray has accepted job {plan.job_id} is not known: {error}. As soon as {jobs.url} answers, "
                    f"`dtrain status {plan.name}` says so; until then a new launch is refused."
                ) from error

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        files = RayFiles(plan)
        if files.control.ended.exists() or not files.control.path.is_dir():
            return "gone"
        standing = files.standing()
        if standing is not None and standing.phase == "over":
            return "gone"
        if tells_of_life(files.control) or (standing is not None and standing.age_s < FRESH_S):
            return "alive"
        return _asked.ask(plan.job_id, max_age_s, lambda: self._ask(plan))[0]

    def _ask(self, plan: JobPlan) -> tuple[Liveness, str]:
        """What Ray has of the job. An end that nobody has written down is written down."""
        files = RayFiles(plan)
        try:
            found = Jobs(_address(plan)).look(plan.job_id)
        except (RayUnreachable, RayRefused) as error:
            return "unknown", f"Ray at {_address(plan)} does not answer: {error}"
        if found is not None and found.phase != "over":
            return "alive", "Ray has not started the job's driver yet" if found.phase == "pending" else ""
        if found is None:
            if time.time() - files.control.path.stat().st_mtime < _ARRIVE_S:
                return "alive", "is being submitted"
            was = files.standing() is not None or files.control.status.exists()
            words = f"Ray at {_address(plan)} does not know the job" + (" any more" if was else ": it never arrived")
            return _gone(plan, words, exits.FAILED)
        standing = files.standing()
        if standing is not None and standing.age_s < _KEEPER_S:
            return "alive", "its keeper is being started again"
        return _gone(plan, found.words, exits.NEVER_RETRY if found.exit_code == exits.NEVER_RETRY else exits.FAILED)

    def reason(self, plan: JobPlan) -> str:
        standing = RayFiles(plan).standing()
        if standing is not None and standing.age_s < FRESH_S:
            return standing.words
        said = _asked.get(plan.job_id)
        return "" if said is None else said[1]

    def called(self, plan: JobPlan) -> str:
        return ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return False

    def hasten(self, plan: JobPlan) -> None:
        pass

    def stop(self, plan: JobPlan) -> None:
        """The coordinator finds the file; the keeper does where the job has not begun."""
        files = RayFiles(plan)
        write_once(files.control.stop(0), "asked for by a person", 0o600)
        if files.standing() is None:
            Jobs(_address(plan)).stop(plan.job_id)

    def kill(self, plan: JobPlan) -> None:
        files = RayFiles(plan)
        write_once(files.killed, "", 0o600)
        if not files.address.exists():
            return  # nothing was ever asked of Ray
        deadline = time.monotonic() + _KILL_S
        while time.monotonic() < deadline:
            standing = files.standing()
            if standing is not None and standing.phase == "over":
                return
            if (standing is None or standing.age_s > FRESH_S) and _is_over_for_ray(plan):
                return
            time.sleep(_POLL_S)

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        """Ray does it: the node's actor starts another agent, or Ray the actor on another node. Returns when that agent
        is there, or cannot be."""
        files = RayFiles(plan)
        before = agent_of(files.control, node_rank)
        if before is not None:
            write_atomic(files.again(node_rank), json.dumps(before.to_json()), 0o600)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            standing = files.standing()
            lost = standing is not None and str(node_rank) in standing.lost
            if lost or files.gave_up(node_rank).exists():
                return False
            if agent_of(files.control, node_rank) != before or files.control.stop(0).exists():
                return True
            time.sleep(_POLL_S)
        return True

    def clear(self, plan: JobPlan) -> None:
        """The keeper's: Ray ends what was on a node that it has given up."""

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """Ray keeps trying to fill a lost node's place, which a job waits for that can't do without."""
        standing = RayFiles(plan).standing()
        why = "" if standing is None else standing.lost.get(str(node_rank), "")
        note = f": {why}" if why else ""
        if enough:
            return Loss(follows="rest", note=note)
        return Loss(follows="nothing" if alive else "wait", note=note + too_few(plan))

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in environ.items() if name != ADDRESS}

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        """The one by whose address Ray knows this node."""
        own = os.environ.get(ADDRESS, "")
        if plan.interface == "auto" and is_loopback(own):
            return LOOPBACK
        others = [node.address for rank, node in RayFiles(plan).nodes().items() if node.address != own]
        return facing(plan.interface, [own] if own else [], others)


def _gone(plan: JobPlan, words: str, code: int) -> tuple[Liveness, str]:
    """Who comes late finds the end, and begins nothing."""
    files, state = RayFiles(plan), "failed"
    if files.control.cancel.exists():
        state, code = "cancelled", exits.CANCELLED
    elif files.control.stop(0).exists():
        state, code = "stopped", exits.STOPPED
    put_end(files.run, files.control, state=state, exit_code=code, reason=words, step=0)
    return "gone", words


def _is_over_for_ray(plan: JobPlan) -> bool:
    """Whether Ray says so; its silence does not."""
    with contextlib.suppress(RayUnreachable):
        found = Jobs(_address(plan)).look(plan.job_id)
        return found is None or found.phase == "over"
    return False


def _address(plan: JobPlan) -> str:
    """Of the Jobs API that was given the job."""
    try:
        return RayFiles(plan).address.read_text()
    except FileNotFoundError:
        return plan.ray.address


def _entrypoint(plan: JobPlan, key: str) -> str:
    where = ("--run-dir", plan.run_dir, "--job-id", plan.job_id, "--key", key)
    return shlex.join((plan.python, "-P", "-m", "dtrain.cluster.ray.driver", *where))


def _metadata(plan: JobPlan) -> dict[str, str]:
    return {"dtrain_name": plan.name, "dtrain_run_dir": plan.run_dir}
