"""Back end of machines that only ssh reaches: an agent on each, which outlives the connection, and a run directory that
all of them share. What runs there is cluster/sshscript.py's, the connection cluster/sshcall.py's. Several hosts more
than nodes are spare ones.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.agents import agents
from dtrain.cluster.answers import LastAnswers
from dtrain.cluster.backends import Loss, too_few
from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import Interface, facing
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import registering_script
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness, ProcessId
from dtrain.cluster.rundir import Control, RunDir, read_json, tells_of_life, write_atomic, write_once
from dtrain.cluster.sshcall import Answer, call, call_all, ssh_argv
from dtrain.cluster.sshscript import (
    check_script,
    exported,
    kill_script,
    look_script,
    start_script,
    sweep_script,
)
from dtrain.cluster.unscheduled import Unscheduled
from dtrain.cluster.zygote import Zygote

_ANSWER_S = 25.0  # for a machine to connect and to answer
_SETUP_S = 600.0  # for its setup lines, before that
_DEATH_S = 5.0  # for killed processes to be gone
_POLL_S = 0.1

_asked: LastAnswers[Liveness] = LastAnswers()


@dataclass(frozen=True, slots=True, kw_only=True)
class SshBackend(Unscheduled):
    agent_args: tuple[str, ...] = ()

    def render(self, plan: JobPlan) -> str:
        script = registering_script(plan, self.agent_args)
        lines = [f"cat >{shlex.quote(str(_control(plan).script))} <<'END OF SCRIPT'\n{script}END OF SCRIPT"]
        lines.append("# to the stdin of each: what you have exported, and then the command behind it")
        for node_rank, host in enumerate(plan.hosts[: plan.nodes]):
            words = shlex.join(ssh_argv(host, plan.ssh_options))
            lines.append(f"{words}  # {start_script(plan, str(_control(plan).script), node_rank, {}).splitlines()[-1]}")
        if spare := plan.hosts[plan.nodes :]:
            lines.append(f"# spare: {' '.join(spare)}")
        return "\n".join(lines) + "\n"

    def check(self, plan: JobPlan) -> None:
        """Every machine that is to be a node: that ssh gets in, that it sees the run directory's disk, and that Python
        there has this dtrain. All that is wrong is said at once."""
        folder = next(path for path in Path(plan.run_dir).parents if path.is_dir())
        try:
            descriptor, shared = tempfile.mkstemp(prefix=".dtrain-shared-", dir=folder)
        except OSError as error:
            raise UsageError(f"run_dir: {folder} can't be written to: {error.strerror}") from error
        os.close(descriptor)
        try:
            scripts = {host: check_script(plan, shared) for host in plan.hosts[: plan.nodes]}
            answers = call_all(scripts, plan.ssh_options, _ANSWER_S + (_SETUP_S if plan.setup else 0.0))
        finally:
            os.unlink(shared)
        if problems := [f"{answer.host}: {words}" for answer in answers if (words := _what_is_wrong(plan, answer))]:
            raise UsageError("cluster.ssh: " + "\n".join(problems))

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        control = _control(plan)
        (RunDir(plan.run_dir).path / "logs").mkdir(exist_ok=True)
        write_atomic(_control(plan).script, registering_script(plan, self.agent_args), 0o600)
        _put_hosts(control, dict(enumerate(plan.hosts[: plan.nodes])))
        by_host = _by_host(_hosts(plan))
        environ = exported(os.environ)
        scripts = {
            host: "\n".join(start_script(plan, str(_control(plan).script), node, environ) for node in nodes)
            for host, nodes in by_host.items()
        }
        answers = call_all(scripts, plan.ssh_options, _ANSWER_S)
        if problems := [f"{answer.host}: {answer.problem}" for answer in answers if answer.problem]:
            raise UsageError("cluster.ssh: " + "\n".join(problems))

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        """On the same machine where it can be reached, else on a spare one."""
        hosts = _hosts(plan)
        self._set_aside(_control(plan), node_rank, hosts[node_rank])
        return bool(_start_on_one(plan, node_rank, [hosts[node_rank], *_spare(plan, hosts)]))

    def _set_aside(self, control: Control, node_rank: int, host: str) -> None:
        """Keeps the record of a process that may still live though it was given up: stopped, starved, or cut off."""
        record = read_json(control.node(node_rank))
        if record is not None:
            text = json.dumps({**record, "reached_as": host})
            write_atomic(control.path / f"superseded-{node_rank}-{record['pid']}.json", text, 0o600)

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        """From the run directory as long as that tells; else the machines are asked."""
        control = _control(plan)
        if control.ended.exists():
            return "gone"
        if tells_of_life(control):
            return "alive"
        return _asked.ask(plan.job_id, max_age_s, lambda: self._ask(plan))

    def _ask(self, plan: JobPlan) -> Liveness:
        scripts = {host: look_script(found) for host, found in _agents(plan).items()}
        answers = call_all(scripts, plan.ssh_options, _ANSWER_S)
        if any("alive" in answer.said for answer in answers):
            return "alive"
        return "unknown" if any(answer.problem for answer in answers) else "gone"

    def stop(self, plan: JobPlan) -> None:
        write_once(_control(plan).stop(0), "asked for by a person", 0o600)  # for those that are only being started
        self._signal(plan, "TERM", _agents(plan))

    def kill(self, plan: JobPlan) -> None:
        """Twice: an agent that was about to replace a dead node may have done so between our look and its death."""
        deadline = time.monotonic() + _DEATH_S
        for _ in range(2):
            self._signal(plan, "KILL", _agents(plan))
        self.clear(plan)
        while self._ask(plan) == "alive" and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        call_all({host: sweep_script(plan) for host in _agents(plan)}, plan.ssh_options, _ANSWER_S)
        _control(plan).status.unlink(missing_ok=True)  # it tells of life

    def clear(self, plan: JobPlan) -> None:
        found = defaultdict(list)
        for path in _control(plan).path.glob("superseded-*.json"):
            if (record := read_json(path)) is not None:
                found[str(record["reached_as"])].append(ProcessId.from_json(record))
        self._signal(plan, "KILL", found)

    def _signal(self, plan: JobPlan, name: str, processes: Mapping[str, Sequence[ProcessId]]) -> None:
        scripts = {host: kill_script(found, name) for host, found in processes.items() if found}
        call_all(scripts, plan.ssh_options, _ANSWER_S)

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """One that is there and still spoils every attempt makes room for a spare machine."""
        hosts = _hosts(plan)
        if alive and (spare := _spare(plan, hosts)):
            control, bad = _control(plan), hosts[node_rank]
            (control.path / f"bad-{node_rank}-{time.time_ns()}").write_text(bad)
            self._set_aside(control, node_rank, bad)
            control.node(node_rank).unlink(missing_ok=True)  # its process sees that, and ends
            if host := _start_on_one(plan, node_rank, spare):
                return Loss(follows="replaced", note=f"; {host} takes the place of {bad}")
        return Loss(follows="rest") if enough else Loss(follows="nothing", note=too_few(plan))

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in environ.items() if not name.startswith("SSH_")}

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        """The one that the connection came in at. A machine that is known to itself only as localhost looks for the way
        to another one."""
        came_in = os.environ.get("SSH_CONNECTION", "").split()[2:3]
        return facing(plan.interface, came_in, [host.rpartition("@")[2] for host in plan.hosts])


def _what_is_wrong(plan: JobPlan, answer: Answer) -> str:
    """Empty where the machine can be a node."""
    for line in answer.said:
        if line.startswith('{"refused"'):
            refused = json.loads(line)
            return f"{refused['refused']}: {refused['message']}"
    if answer.problem:
        return answer.problem
    if "shared" not in answer.said:
        return (
            f"does not see {Path(plan.run_dir).parent}, where the run directory is to be. Set run_dir to a place on a "
            "disk that all machines share."
        )
    gpus = next((int(line.split()[1]) for line in answer.said if line.startswith("gpus ")), 0)
    if gpus < plan.gpus_per_node:
        return f"has {gpus} GPUs, and {plan.gpus_per_node} are asked for. Set cluster.gpus_per_node."
    return ""


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _hosts(plan: JobPlan) -> dict[int, str]:
    """Node rank -> the machine that it is, or was last, started on."""
    said = read_json(_control(plan).path / "hosts.json")
    return dict(enumerate(plan.hosts[: plan.nodes])) if said is None else {int(node): said[node] for node in said}


def _put_hosts(control: Control, hosts: Mapping[int, str]) -> None:
    write_atomic(control.path / "hosts.json", json.dumps(hosts), 0o600)


def _spare(plan: JobPlan, hosts: Mapping[int, str]) -> list[str]:
    """Machines that are no node, and have not been given up as one."""
    bad = {path.read_text() for path in _control(plan).path.glob("bad-*")}
    return [host for host in plan.hosts if host not in bad and host not in hosts.values()]


def _start_on_one(plan: JobPlan, node_rank: int, candidates: Sequence[str]) -> str:
    """The first that can be reached, with an agent of the node on it now; "" where none can."""
    control, hosts = _control(plan), _hosts(plan)
    script = start_script(plan, str(control.script), node_rank, exported(os.environ))
    for host in candidates:
        _put_hosts(control, {**hosts, node_rank: host})  # first: what was started must be found again
        if not call(host, plan.ssh_options, script, _ANSWER_S).problem:
            return host
    _put_hosts(control, hosts)
    return ""


def _by_host(hosts: Mapping[int, str]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for node, host in hosts.items():
        found[host].append(node)
    return dict(found)


def _agents(plan: JobPlan) -> dict[str, list[ProcessId]]:
    """Host -> the agents there, none for a machine on which none has put itself down yet."""
    return {host: agents(plan, nodes) for host, nodes in _by_host(_hosts(plan)).items()}
