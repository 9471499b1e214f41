"""docs/backends.md, generated: `python -m dtrain.launcher.conformance > docs/backends.md`. What every back end is held
to by the tests that are the same for all (tests/assets/conformance.py), and what is none of its affairs by design.
"""

from __future__ import annotations

POINTS = {
    "environment": "workers find the variables of torchrun and of the config, and nobody else's place in a job",
    "rank order": "ranks are numbered node by node; local ranks from 0 on each",
    "addresses": "every rank reaches rank 0 at MASTER_ADDR and MASTER_PORT",
    "output": "both streams of every rank are in the node logs and come out of `dtrain logs --rank`",
    "hostile values": "names, paths, arguments and variables with blanks, quotes, `$( )`, newlines arrive as they are",
    "secrets": "a secret reaches the workers, and is in no file of the run, no command line, no output",
    "exit codes": "`launch` ends with 0, 3, 85 or 130 as docs/files-and-exit-codes.md says",
    "failing workers": "the same code of a worker twice, or 93 at once, ends the run with 93 and is named",
    "signals": "Ctrl-C or SIGTERM saves and ends with 85, or leaves the run to its scheduler (130)",
    "cancel": "while it runs, while it saves and after its end: cancelled, once, and nothing is left",
    "cancel of what starts": "in the setup lines of the nodes: what they have started goes too",
    "cancel of what waits": "a job that has no nodes yet is cancelled and never starts",
    "submit twice": "a second launch of a run that lives starts nothing and ends with 2",
    "worker crash": "the workers start again in place, under the same job and agents",
    "node loss": "a machine that dies is replaced, and all ranks start again",
    "requeue": "a job that its scheduler starts again goes on as the same run",
    "silence": "while the engine does not answer a run is `running` or `unknown`, never over, and no second one starts",
    "nothing left": "after each end no process and nothing in the engine",
    "same losses": "the SHA-256 of a run's losses is that of the local back end at the same world size",
}
BACKENDS = ("local", "slurm", "kubernetes", "ray", "ssh", "mpi")
_NO_QUEUE = "nothing waits: there is no queue"
_NO_SCHEDULER = "nothing starts a job again: there is no scheduler"
NOT_BY_DESIGN = {
    ("local", "cancel of what waits"): _NO_QUEUE,
    ("local", "requeue"): _NO_SCHEDULER,
    ("local", "silence"): "the engine is this machine's kernel",
    ("ray", "requeue"): "Ray starts a lost keeper of the agents again, never a job that has ended",
    ("local", "same losses"): "it is what the others are compared with",
    ("ssh", "cancel of what waits"): _NO_QUEUE,
    ("ssh", "requeue"): _NO_SCHEDULER,
    ("mpi", "cancel of what waits"): "nothing waits: mpirun has its nodes, or does not begin",
    ("mpi", "requeue"): _NO_SCHEDULER,
    ("mpi", "silence"): "there is nobody to ask: the run directory tells",
    ("mpi", "node loss"): "mpirun ends everything with a lost machine; the same command goes on",
}
# What the suite has not been run for, or has not held for yet: its tests are not among those of that back end.
NOT_SHOWN: frozenset[tuple[str, str]] = frozenset()
_HEAD = """\
# Back ends

Written by `python -m dtrain.launcher.conformance`; a test keeps it true. One suite of tests runs against every back end
(tests/assets/conformance.py, with a real Slurm and a real Ray of four nodes, real sshds, a real mpirun, and the tests'
own Kubernetes, see docs/kubernetes.md): **yes** is a point that it shows there, a dash one that it does not show yet. A
number is a reason why the point is none of this back end's affairs. Ray's and Kubernetes' own tests go further
(tests/test_ray.py, tests/test_kubernetes*.py).
"""


def render() -> str:
    """The whole page."""
    reasons = list(dict.fromkeys(NOT_BY_DESIGN.values()))
    lines = [_HEAD, f"| | {' | '.join(BACKENDS)} |", f"|---|{'---|' * len(BACKENDS)}"]
    for point in POINTS:
        lines.append(f"| {point} | {' | '.join(_cell(name, point, reasons) for name in BACKENDS)} |")
    lines += ["", *(f"- {point}: {words}." for point, words in POINTS.items()), "", "By design not:", ""]
    lines += [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    return "\n".join(lines)


def _cell(backend: str, point: str, reasons: list[str]) -> str:
    if (why := NOT_BY_DESIGN.get((backend, point))) is not None:
        return f"by design not ({reasons.index(why) + 1})"
    return "-" if (backend, point) in NOT_SHOWN else "yes"


if __name__ == "__main__":
    print(render())
