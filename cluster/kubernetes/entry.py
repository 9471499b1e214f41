"""The bash that is a pod's first process, and the script in the run directory that it runs. Pure text.

As process 1 it reaps what workers leave behind, and hands the kubelet's SIGTERM on to the agent. Its exit code tells
the Job what to do (cluster/kubernetes/render.py): the run's own where the run has ended, else one to be tried again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.mirror import is_url
from dtrain.cluster.nodescript import node_script
from dtrain.cluster.rundir import RunDir

_PODSTART = ("-P", "-m", "dtrain.cluster.kubernetes.podstart")

# $1: the run directory, $2: the job, $3: the Python that fetches the first, where that is a URL. A uid of a numeric
# user has no home and no name as a rule, and torch asks for both. A node without which the run goes on stands by until
# the run is started anew (podstart.py). 75 is os.EX_TEMPFAIL: this process is lost and the run is not.
ENTRY = r"""
run=$1 control=$1/control/$2 node=$JOB_COMPLETION_INDEX agent="" stopped=""
trap 'stopped=1; [ -z "$agent" ] || kill -TERM "$agent"' TERM
export HOSTNAME
[ -w "${HOME:-/}" ] || export HOME=/tmp
[ -n "${USER-}" ] || export USER=dtrain LOGNAME=dtrain
if [ $# -gt 2 ]; then
  export DTRAIN_MIRROR=${TMPDIR:-/tmp}/dtrain-run
  run=$("$3" -P -m dtrain.cluster.kubernetes.podcopy fetch "$1" "$2") || {
    code=$?
    [ "$code" -lt 126 ] || code=93  # there is no such Python
    exit "$code"
  }
  control=$run/control/$2
fi
if ! [ -r "$control/token" ]; then
  echo "node $node ($HOSTNAME): run_dir: $control is not there, or can't be read by user $(id -u)." \
    "See that cluster.kubernetes.volumes mounts it, and who cluster.kubernetes.user is." >&2
  exit 93
fi
ended() {
  [[ -e $control/ended.json && $(<"$control/ended.json") =~ \"exit_code\":\ ([0-9]+) ]] && code=${BASH_REMATCH[1]}
}
if ended && [ "$code" != 85 ]; then exit "$code"; fi
mkdir -p "$run/logs"
exec 3> >(exec tee -a "$run/logs/agent-$node.log"); tee=$!
while :; do
  bash "$control/node.sh" "$node" >&3 2>&1 3>&- </dev/null & agent=$!
  [ -z "$stopped" ] || kill -TERM "$agent"
  while wait "$agent"; code=$?; [ "$code" -gt 128 ] && kill -0 "$agent" 2>/dev/null; do :; done
  [ -e "$control/without-$node" ] && ! ended && [ -z "$stopped" ] || break
done
exec 3>&-
(read -rt 3 <> <(:); kill "$tee") 2>/dev/null & guard=$!  # what the agent has left may hold the log open
wait "$tee"; kill "$guard" 2>/dev/null
[ $# = 2 ] || "$3" -P -m dtrain.cluster.kubernetes.podcopy push "$1" "$2"
[ -r "$control/token" ] || exit 93
if ended; then
  :
elif [ -n "$stopped" ] && [ "$code" -gt 128 ]; then
  code=85
else
  case $code in 1 | 2 | 3) code=75 ;; esac
fi
exit "$code"
"""


def entry_argv(plan: JobPlan) -> list[str]:
    own = (plan.run_dir, plan.job_id, *((plan.python,) if is_url(plan.run_dir) else ()))
    return [_literal(word) for word in ("bash", "-c", ENTRY.lstrip("\n"), "dtrain", *own)]


def _literal(word: str) -> str:
    """Kubernetes expands $(NAME) in commands, and takes $$ for a dollar (Container.command, v1)."""
    return re.sub(r"\$(?=[$(])", "$$", word)


def pod_script(plan: JobPlan, agent_args: Sequence[str]) -> str:
    """control/<job_id>/node.sh, which each pod runs with its completion index."""
    where = ("--run-dir", plan.run_dir, "--job-id", plan.job_id)
    return node_script(plan, (plan.python, *_PODSTART, *where, *agent_args, "--node-rank"))


def script_path(plan: JobPlan) -> str:
    script = RunDir(plan.run_dir).control(plan.job_id).script
    return f"{plan.run_dir}/control/{plan.job_id}/{script.name}" if is_url(plan.run_dir) else str(script)
