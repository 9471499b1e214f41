"""Slurm's commands with faults: a folder for the front of PATH, whose commands do what FAULT_<COMMAND> says and log
each call. And a Python for jobs that only sleeps, so that a cluster is full of runs on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
FAULTS = ("fail", "timeout", "slow", "hang", "lost", "silent", "late")  # of a command

_WRAPPER = """\
#!/bin/bash
echo "$(date +%s.%N) {command} $*" >>"${{FAULT_LOG:-/dev/null}}"
unreachable="Batch job submission failed: Unable to contact slurm controller (connect failure)"
timed_out="Batch job submission failed: Socket timed out on send/recv operation"
case "${{FAULT_{upper}:-}}" in
  fail) echo "{command}: error: $unreachable" >&2; exit 1;;
  timeout) sleep 0.5; echo "{command}: error: $timed_out" >&2; exit 1;;
  slow) sleep 0.$((RANDOM % 10)); exec {real} "$@";;
  hang) sleep 5; exit 1;;
  lost) {real} "$@" >/dev/null; echo "{command}: error: $timed_out" >&2; exit 1;;
  silent) {real} "$@" >/dev/null 2>&1; exit 0;;
  late) said=$({real} "$@"); sleep 1.$((RANDOM % 10)); echo "$said";;
  *) exec {real} "$@";;
esac
"""

# Called as a job's script calls its Python: `-c PROBE` first, then `... launch --batch --run-dir R --job-id J ...`.
_SLEEPER = """\
#!/bin/bash
[ "$1" = -c ] && exit 0
while [ $# -gt 0 ]; do
  case "$1" in --run-dir) run=$2;; --job-id) job=$2;; esac
  shift
done
control=$run/control/$job
grep -qs '"slurm_job_id": ""' "$control"/slurm-owner-*.json && exit 93  # as the driver does
echo "$SLURM_JOB_ID $job" >>"$run/started"
[ -n "$SLURM_RESTART_COUNT" ] && rm -f "$control/ended.json"
trap 'state=stopped code=85' TERM
state=done code=0
for _ in $(seq {tenths}); do sleep 0.1; [ $state = done ] || break; done
[ -e "$control/cancel" ] && state=cancelled code=3
words='"state": "'$state'", "exit_code": '$code', "reason": "", "step": 1'
echo "{{$words, \\"at\\": $(date +%s)}}" >"$control/ended.$$"
ln "$control/ended.$$" "$control/ended.json"; rm "$control/ended.$$"
exit $code
"""


def write_wrappers(folder: Path) -> Path:
    """`folder`, made, for the front of PATH."""
    folder.mkdir(parents=True)
    for command in COMMANDS:
        path = folder / command
        path.write_text(_WRAPPER.format(command=command, upper=command.upper(), real=shutil.which(command)))
        path.chmod(0o755)
    return folder


def write_sleeper(path: Path, seconds: float) -> str:
    path.write_text(_SLEEPER.format(tenths=int(seconds * 10)))
    path.chmod(0o755)
    return str(path)
