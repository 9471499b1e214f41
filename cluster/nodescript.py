"""The shell that runs on a node before its agent: the user's `setup` lines, verbatim, then a look at the Python that is
to be the agent's. What fails there would fail again, so it ends the job with 93 and one message. Pure text.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dtrain.cluster.agentcommand import AGENT
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.mirror import VARIABLE, is_url
from dtrain.cluster.procs import EARLY_STOP, STOP_SIGNALS
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.version import VERSION

# Written so that Pythons that are too old can read it. `-P` is one that they don't know, hence the first line. An agent
# needs nothing but dtrain and what comes with Python, so it is not imported: each node would wait for that twice.
_PROBE = """\
import sys
sys.path[:1] = [p for p in sys.path[:1] if p]
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d, and dtrain needs 3.11 or newer" % sys.version_info[:2])
try:
    from importlib.util import find_spec
    if find_spec("dtrain.runtime.agent") is None:
        raise ImportError("a part of it is missing")
    from dtrain.cluster.version import VERSION
except ImportError as error:
    sys.exit("has no dtrain that can be imported: %s" % error)
if VERSION != sys.argv[1]:
    sys.exit("has dtrain %s, but the job was submitted with %s" % (VERSION, sys.argv[1]))
"""

# Bash's own means only: PATH may be what is wrong. An agent ends a job with the same two records: runtime/nodestart.py.
_REFUSE_ON_NODE = r"""
dtrain_refuse() {  # $1: the key of the config, $2: why
  trap - EXIT
  if [ -n "${DTRAIN_EARLY_STOP-}" ]; then  # a stop has come, which may be what broke it
    [ -z "${dtrain_stop-}" ] || echo "a stop before the node was prepared" >"$dtrain_stop"
    exit 85
  fi
  local why="$dtrain_where ($HOSTNAME): $2" now
  printf -v now '%(%s)T' -1
  echo "$why" >&2
  [ -d "${dtrain_ended%/*}" ] || exit 93  # nothing of the job was recorded
  why=${why//\\/\\\\}; why=${why//\"/\\\"}; why=${why//[[:cntrl:]]/ }  # as JSON
  local words='"state": "failed", "exit_code": 93, "reason": "'"$why"'"'
  umask 077
  echo "{$words, \"at\": $now}" >"$dtrain_ended.$$" && ln "$dtrain_ended.$$" "$dtrain_ended" &&
    echo "{\"time\": $now, \"type\": \"ended\", $words, \"step\": 0}" >>"$dtrain_events"
  rm -f "$dtrain_ended.$$"
  exit 93
}
"""
_REFUSE_TO_PARENT = r"""
dtrain_refuse() {
  trap - EXIT
  local why=$2
  why=${why//\\/\\\\}; why=${why//\"/\\\"}; why=${why//[[:cntrl:]]/ }  # as JSON
  echo "{\"refused\": \"$1\", \"message\": \"$why\"}" >&9
  exit 93
}
"""
_CHECK = r"""
dtrain_check() {  # $1: how setup line $dtrain_line ended
  [ "$1" = 0 ] || dtrain_refuse "cluster.setup.$((dtrain_line - 1))" \
    "setup line $dtrain_line, \`${dtrain_setup[dtrain_line - 1]}\`, ended with $1. Try it in a shell there."
}
"""
_LOOK_AT_PYTHON = r"""
dtrain_after=$(printf '%s; ' "${dtrain_setup[@]}")
dtrain_said=$("$dtrain_python" -c "$dtrain_probe" "$dtrain_version" 2>&1 </dev/null) || {
  dtrain_said=${dtrain_said##*$'\n'}
  dtrain_said=${dtrain_said#*: line [0-9]*: "$dtrain_python": }  # what bash says before why it can't be started
  dtrain_refuse cluster.python "$dtrain_python: $dtrain_said${dtrain_setup:+ (after setup: ${dtrain_after%;*})}.\
 Set it to one that has dtrain $dtrain_version."
}
"""


# A scheduler's signal that comes before Python runs is kept for it. Children get theirs as usual, and may die of it.
_KEEP_STOPS = [f"trap 'export {EARLY_STOP}={number.name}' {number.name}" for number in STOP_SIGNALS]
_DEAF = f"trap '' {' '.join(number.name for number in STOP_SIGNALS)}  # until Python has handlers of its own"


def agent_argv(plan: JobPlan, agent_args: Sequence[str]) -> tuple[str, ...]:
    """An agent's command line but for the node's rank, which comes last."""
    where = ("--run-dir", plan.run_dir, "--job-id", plan.job_id)
    return (plan.python, *AGENT, *where, *agent_args, "--node-rank")


def node_script(plan: JobPlan, agent_argv: Sequence[str], *, stop: str = "") -> str:
    """A bash script, started with the node's rank, that prepares the node and becomes the agent: `agent_argv` and the
    rank behind it. `stop`: where a scheduler's signals may come from the first moment on, the file to put for one that
    broke the preparation."""
    lines = [
        "dtrain_node=$1",
        *([*_KEEP_STOPS, f"dtrain_stop={shlex.quote(stop)}"] if stop else ()),
        *_records(plan, 'dtrain_where="node $dtrain_node"'),
        *_preparation(_REFUSE_ON_NODE, plan.setup, plan.python),
        *([_DEAF] if stop else ()),
    ]
    return "\n".join([*lines, f'exec {shlex.join(agent_argv)} "$dtrain_node"']) + "\n"


def registering_script(plan: JobPlan, agent_args: Sequence[str]) -> str:
    """The same where nobody else knows which process that is: it puts itself down as the node's first."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    own = shlex.quote(f'"job_id": "{plan.job_id}"')
    first = (
        "export HOSTNAME\n"  # which this bash has found out
        # A launch that was killed while it started this may have been followed by another one.
        f"case $(<{shlex.quote(str(run.job))}) in *{own}*) ;; *) echo 'another job has the run'; exit 93 ;; esac\n"
        "IFS= read -r dtrain_stat </proc/$$/stat; dtrain_stat=(${dtrain_stat##*)})\n"
        "read -r dtrain_boot </proc/sys/kernel/random/boot_id\n"
        f"dtrain_mine={shlex.quote(str(control.path))}/node-$1.json\n"
        '(umask 077; printf \'{"pid": %d, "started": %d, "boot": "%s", "host": "%s"}\' $$ "${dtrain_stat[19]}" '
        '"$dtrain_boot" "$HOSTNAME" >"$dtrain_mine.$$") && mv -f "$dtrain_mine.$$" "$dtrain_mine" || exit 1\n'
        f"cd {shlex.quote(plan.cwd)} 2>/dev/null || cd /\n"
    )
    return first + node_script(plan, agent_argv(plan, agent_args), stop=str(control.stop(0)))


def batch_script(plan: JobPlan, argv: Sequence[str], setup: Sequence[str]) -> str:
    """The same preparation on the host that a scheduler runs a job's script on, which then becomes `argv`."""
    lines = [
        *_KEEP_STOPS,
        *_records(plan, 'dtrain_where="job ${SLURM_JOB_ID-}"'),
        f"cd {shlex.quote(plan.cwd)} || exit 93",
        *_preparation(_REFUSE_ON_NODE, setup, argv[0]),
        _DEAF,
    ]
    return "\n".join([*lines, f"exec {shlex.join(argv)}"]) + "\n"


def _records(plan: JobPlan, where: str) -> list[str]:
    """What `dtrain_refuse` needs to know."""
    run = RunDir(plan.run_dir)
    ended, events = run.control(plan.job_id).ended, run.events
    return [where, f"dtrain_ended={_on_node(run, ended)}", f"dtrain_events={_on_node(run, events)}"]


def _on_node(run: RunDir, path: Path) -> str:
    """As a word of a shell. The copy of a run directory at a URL lies where the node's own variable says."""
    if not is_url(run.place):
        return shlex.quote(str(path))
    return f'"${VARIABLE}"/{shlex.quote(str(path.relative_to(run.path.parent)))}'


def checking_script(setup: Sequence[str], python: str, argv: Sequence[str]) -> str:
    """The same preparation before a job is submitted, and then `argv` with stdin and stdout as they were. Who refuses
    says so as {"refused": key, "message": text} on stdout, where nothing that `setup` prints can be."""
    streams = "exec 8<&0 9>&1 </dev/null >&2"
    lines = [streams, *_preparation(_REFUSE_TO_PARENT, setup, python)]
    return "\n".join([*lines, f"exec {shlex.join(argv)} <&8 >&9 8<&- 9>&-"]) + "\n"


def _preparation(refuse: str, setup: Sequence[str], python: str) -> list[str]:
    lines = [
        f"dtrain_version={VERSION}",
        f"dtrain_python={shlex.quote(python)}",
        f"dtrain_probe={shlex.quote(_PROBE)}",
        f"dtrain_setup=({shlex.join(setup)})",
        refuse,
    ]
    if setup:
        lines += [_CHECK, "trap 'dtrain_check $?' EXIT  # a line may also end the shell"]
        for index, line in enumerate(setup):
            lines += [f"dtrain_line={index + 1}", line, "dtrain_check $?"]
        lines.append("trap - EXIT")
    return [*lines, _LOOK_AT_PYTHON]
