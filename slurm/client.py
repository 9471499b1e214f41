"""Slurm's own commands, run so that what they say can be trusted: a clean environment, a time limit, and "no answer"
told apart from "no". What their output means is slurm/records.py's; when to ask is slurm/queue.py's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence

from dtrain.cluster.errors import DtrainError, UnclearError, UsageError

QUESTION_S = 20.0  # slurmctld's own limit, MessageTimeout, is 10 s as a rule

# Words of an error after which the request may have arrived, or may yet. Of slurm_strerror(3), and of libc.
_NO_ANSWER = re.compile(
    r"unable to contact|timed? ?out|zero bytes|connection (refused|reset|aborted)|communication|broken pipe|standby"
    r"|(connect|send|receive|shutdown) failure|no route to host|network is unreachable|host is down|unexpected message"
    r"|transport endpoint|resource temporarily unavailable|interrupted system call|try again",
    re.IGNORECASE,
)
# What of the environment changes what a command does or prints. SLURM_CONF says which cluster it is.
_OURS = re.compile(r"(SLURM_(?!CONF$).*|SQUEUE_.*|SCONTROL_.*|SACCT_.*|SCANCEL_.*)")
# Defaults for sbatch that would have it wait for the job's end, print something else, make many jobs of one, or submit
# to another cluster than the one that we ask.
_NEVER = frozenset(("wait", "test-only", "array", "quiet", "verbose", "clusters"))
# Of sbatch(1), INPUT ENVIRONMENT VARIABLES: those whose option has another name.
_OPTIONS = {
    "timelimit": "time",
    "array-inx": "array",
    "debug": "verbose",
    "mem-per-node": "mem",
    "req-switch": "switches",
}
_EXCLUSIVE = (frozenset(("requeue", "no-requeue")), frozenset(("mem", "mem-per-cpu", "mem-per-gpu")))


class SlurmUnreachable(UnclearError):
    """A question had no answer, or whether a request had an effect is not known."""


class SlurmRefused(DtrainError):
    """Slurm has said no, in its own words."""


def ask(*argv: str, timeout_s: float | None = None) -> str:
    """What a command prints. Raises SlurmUnreachable, SlurmRefused; UsageError where this host has no such command."""
    limit_s = QUESTION_S if timeout_s is None else timeout_s
    code, said, errors = run(argv, {**environment(os.environ), "LC_ALL": "C"}, limit_s)
    if code is None:
        raise SlurmUnreachable(f"{argv[0]}: no answer within {limit_s:g} s")
    if code == 0:
        return said
    words = last_words(errors) or f"{argv[0]} ended with {code}"
    raise SlurmUnreachable(words) if is_no_answer(errors, code) else SlurmRefused(words)


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    limit_s: float,
    *,
    cwd: str | None = None,
    keeps: Sequence[int] = (),
) -> tuple[int | None, str, str]:
    """Exit code, None where it had to be killed; what it printed. `keeps`: descriptors that it inherits. Its session is
    its own, so that Ctrl-C does not cut it off half way. Raises UsageError where there is no such command."""
    try:
        process = subprocess.Popen(
            list(argv), env=dict(environ), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True, pass_fds=tuple(keeps),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise no_command(argv[0]) from error
    try:
        said, errors = process.communicate(timeout=limit_s)
        return process.returncode, said, errors
    except subprocess.TimeoutExpired:
        return None, "", ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # also what a site's wrapper script has started
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def is_no_answer(stderr: str, code: int) -> bool:
    """Whether a failure leaves open what has happened: killed, silent, or trouble on the way to slurmctld."""
    return code < 0 or code > 128 or not stderr.strip() or bool(_NO_ANSWER.search(stderr))


def last_words(stderr: str) -> str:
    """The lines that say what is wrong, without the names of who says it."""
    lines = [re.sub(r"^(\w+: )?(error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines[-3:]))


def no_command(name: str) -> UsageError:
    return UsageError(
        f"cluster.backend: slurm needs Slurm's command {name}, which is not in PATH. Launch on a login node of the "
        "cluster (`module load slurm` there, where it is a module), or set another back end."
    )


def environment(environ: Mapping[str, str], header: Collection[str] = ()) -> dict[str, str]:
    """What Slurm's commands are started with. `header`: long names of the options that a script sets, which variables
    of the same meaning would override."""
    hidden = _NEVER.union(header, *(group for group in _EXCLUSIVE if group & set(header)))
    return {name: value for name, value in environ.items() if not _OURS.fullmatch(name) and _option(name) not in hidden}


def _option(variable: str) -> str | None:
    """SBATCH_MEM_PER_CPU -> mem-per-cpu; None for what is no default of an option."""
    if not variable.startswith("SBATCH_"):
        return None
    name = variable.removeprefix("SBATCH_").lower().replace("_", "-")
    return _OPTIONS.get(name, name)


def script_options(script: str) -> set[str]:
    """Long names of the options in the `#SBATCH` lines of a script."""
    return set(re.findall(r"^#SBATCH\s+--([a-z0-9-]+)", script, re.MULTILINE))
