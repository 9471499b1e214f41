"""Slurm's commands with faults: a folder for the front of PATH, whose commands do what FAULT_<COMMAND> says and log
each call. And a Python for jobs that only sleeps, so that a cluster is full of runs on two cores."""

from __future__ import annotations

import os
import shutil
import sys
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

# The nodes' Python: this one, but for `launch --batch --run-dir R --job-id J ...`. In place of the driver it puts an
# earlier end aside, sleeps, and says how it ended: for SIGTERM, that it can go on.
_SLEEPER = """\
#!{python} -IS
import os, signal, sys, time
if "--batch" not in sys.argv:
    os.execv({whole!r}, [{whole!r}, *sys.argv[1:]])
given = dict(zip(sys.argv, sys.argv[1:]))
run, job = given["--run-dir"], given["--job-id"]
control = f"{{run}}/control/{{job}}/"
owner, ended = control + "slurm-owner-0001.json", control + "ended.json"
if os.path.exists(owner) and '"slurm_job_id": ""' in open(owner).read():
    sys.exit(93)
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
with open(f"{{run}}/started", "a") as file:
    print(os.environ["SLURM_JOB_ID"], job, file=file)
if os.environ.get("SLURM_RESTART_COUNT") and os.path.exists(ended):
    os.remove(ended)
until = time.monotonic() + {seconds}
while not seen and time.monotonic() < until:
    time.sleep(0.1)
cancelled = os.path.exists(control + "cancel")
state, code = ("cancelled", 3) if cancelled else ("stopped", 85) if seen else ("done", 0)
with open(control + "ended.new", "w") as file:
    file.write(f'{{{{"state": "{{state}}", "exit_code": {{code}}, "reason": "", "step": 1, "at": {{time.time()}}}}}}')
os.rename(control + "ended.new", ended)
sys.exit(code)
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
    path.write_text(_SLEEPER.format(python=os.path.realpath(sys.executable), whole=sys.executable, seconds=seconds))
    path.chmod(0o755)
    return str(path)
