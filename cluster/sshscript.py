"""The bash that the ssh back end runs on a machine: to look at it, to start agents, to ask for processes and to signal
them. Pure text; bash and /proc are all that it needs there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import checking_script
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir

# A session's and a machine's own, which mean nothing elsewhere. All else that a person has exported goes along, as with
# a scheduler that takes the environment along.
_STAYS = re.compile(
    r"HOME|USER|LOGNAME|SHELL|HOSTNAME|HOST|PWD|OLDPWD|SHLVL|_|MAIL|TERM.*|COLUMNS|LINES|DISPLAY|WAYLAND.*|XDG_(?!.*_HOME$).*"
    r"|DBUS_.*|SSH_.*|TMUX.*|STY|LS_COLORS|PS[1-4]|SLURM_.*|BASH.*|EUID|UID|PPID"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# $1 pid, $2 start time, $3 boot: whether that very process lives. Field 22 of /proc/PID/stat is the start time; what
# stands before it may hold blanks and brackets.
_IS_ALIVE = """\
dtrain_alive() {
  local boot stat fields
  read -r boot </proc/sys/kernel/random/boot_id && [ "$boot" = "$3" ] || return
  { IFS= read -r stat </proc/"$1"/stat; } 2>/dev/null || return
  fields=(${stat##*)})
  [ "${fields[19]}" = "$2" ] && [[ ${fields[0]} != [ZX] ]]
}
"""
# $1: all of the session that this process led. The lines of `setup` that an agent waits for would outlive it.
_END_SESSION = """\
dtrain_end_session() {
  local file stat fields
  for file in /proc/[0-9]*/stat; do
    { IFS= read -r stat <"$file"; } 2>/dev/null || continue
    fields=(${stat##*)})
    file=${file#/proc/}
    [ "${fields[3]}" != "$1" ] || kill -KILL "${file%/*}"
  done
}
"""


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """What goes along with the agents."""
    return {name: value for name, value in environ.items() if _NAME.fullmatch(name) and not _STAYS.fullmatch(name)}


def check_script(plan: JobPlan, shared: str) -> str:
    """Says `shared` where the file is there, the number of GPUs, and what the preparation of a node refuses."""
    preparation = shlex.quote(checking_script(plan.setup, plan.python, ("true",)))
    return (
        f"[ -e {shlex.quote(shared)} ] && echo shared\n"
        'dtrain_gpus=(/dev/nvidia[0-9]*); [ -e "${dtrain_gpus[0]}" ] || dtrain_gpus=()\n'
        'echo "gpus ${#dtrain_gpus[@]}"\n'
        f"cd {shlex.quote(plan.cwd)} 2>/dev/null || cd /\n"
        f"bash -c {preparation} </dev/null"
    )


def start_script(plan: JobPlan, script: str, node_rank: int, environ: Mapping[str, str]) -> str:
    """Starts `script`, a file that all nodes share, so that it outlives the connection."""
    log = RunDir(plan.run_dir).agent_log(node_rank)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(environ.items())]
    lines += [
        f"mkdir -p {shlex.quote(str(log.parent))}",
        f"setsid bash {shlex.quote(script)} {node_rank} </dev/null >>{shlex.quote(str(log))} 2>&1 &",
    ]
    return "\n".join(lines)


def look_script(processes: Iterable[ProcessId]) -> str:
    """Says `alive` for each that is."""
    return _IS_ALIVE + "\n".join(f"dtrain_alive {_words(process)} && echo alive" for process in processes)


def kill_script(processes: Iterable[ProcessId], signal_name: str) -> str:
    """With KILL, all of the sessions that they lead, too."""
    after = " && dtrain_end_session {}" if signal_name == "KILL" else ""
    return f"{_IS_ALIVE}{_END_SESSION}" + "\n".join(
        f"dtrain_alive {_words(process)} && kill -{signal_name} {process.pid}{after.format(process.pid)}"
        for process in processes
    )


def sweep_script(plan: JobPlan) -> str:
    """Removes what killed processes have left on the machine's own disk."""
    sweep = "from dtrain.cluster.scratch import sweep; sweep()"
    return f"{shlex.quote(plan.python)} -P -c {shlex.quote(sweep)} </dev/null >/dev/null 2>&1"


def _words(process: ProcessId) -> str:
    return f"{process.pid} {process.started} {shlex.quote(process.boot)}"
