"""SlurmConfig -> options of sbatch and srun, one place for each: what is asked for twice or is dtrain's own affair is a
problem at config time. Pure. How a `#SBATCH` line quotes is here too; the script around it is slurm/script.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.slurmconfig import SlurmConfig, split_gpus

Found = Iterator[tuple[str, str]]  # key, message

# Typed keys that are an option of the same name; `_` is `-`.
_TYPED = (
    "partition",
    "account",
    "qos",
    "time",
    "mem",
    "constraint",
    "nodelist",
    "exclude",
    "reservation",
    "dependency",
)

# Options with a place of their own, which `sbatch:` therefore must not set.
_ELSEWHERE = {
    **{name: f"cluster.slurm.{name}" for name in (*_TYPED, "signal")},
    "no-kill": "cluster.slurm.no_kill",
    "gpus-per-node": "cluster.slurm.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_node (there is one task a node)",
    "nodes": "cluster.nodes",
    "job-name": "name, at the top level",
    "requeue": "cluster.slurm.on_stop",
    "no-requeue": "cluster.slurm.on_stop",
    "container": "cluster.container",
    "container-image": "cluster.container.image",
    "container-mounts": "cluster.container.mounts",
}
_TASKS = "dtrain starts one agent a node, and that starts the workers (cluster.procs_per_node)"
_LOG = "launch keeps the job's log in the run directory"
_OURS = {
    "ntasks": _TASKS,
    "ntasks-per-node": _TASKS,
    "ntasks-per-core": _TASKS,
    "ntasks-per-socket": _TASKS,
    "ntasks-per-gpu": _TASKS,
    "output": _LOG,
    "error": _LOG,
    "open-mode": "a requeued job goes on in the same log",
    "array": "a run is one job; start several with --name",
    "wrap": "launch brings the script",
    "chdir": "the script changes to where you launched",
    "clusters": "dtrain asks the cluster of this host; launch on a login node of the other one",
    "parsable": "launch reads what sbatch says",
    "quiet": "launch reads what sbatch says",
    "test-only": "it would submit nothing; `dtrain launch --dry-run` prints the script",
    "wait": "launch follows the job, or does not with --detach",
    "help": "it would submit nothing",
    "usage": "it would submit nothing",
    "version": "it would submit nothing",
}
_SRUN_OURS = {
    "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "cpu-bind", "kill-on-bad-exit", "no-kill", "unbuffered",
    "input", "output", "error", "open-mode", "export", "job-name", "overlap", "exact", "nodelist", "exclude", "jobid",
    "container-image", "container-mounts", "label", "pty", "multi-prog", "het-group", "relative", "signal", "time",
}  # fmt: skip
_SHORT = {
    "A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile", "G": "gpus",
    "H": "hold", "I": "immediate", "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes", "O": "overcommit",
    "Q": "quiet", "S": "core-spec", "V": "version", "W": "wait", "a": "array", "b": "begin", "c": "cpus-per-task",
    "d": "dependency", "e": "error", "h": "help", "i": "input", "k": "no-kill", "m": "distribution", "n": "ntasks",
    "o": "output", "p": "partition", "q": "qos", "s": "oversubscribe", "t": "time", "v": "verbose", "w": "nodelist",
    "x": "exclude",
}  # fmt: skip
# sbatch(1) of 20.11 to 25.05, beside the options above. Others may be a plugin's, and are passed on.
_KNOWN = frozenset(
    (
        *(*_ELSEWHERE, *_OURS, *_SHORT.values()),
        *(
            "acctg-freq",
            "batch",
            "bb",
            "bbf",
            "begin",
            "burst-buffer",
            "cluster-constraint",
            "comment",
            "consolidate-segments",
        ),
        *("contiguous", "cores-per-socket", "cpu-freq", "cpus-per-gpu", "deadline", "delay-boot", "exclusive"),
        *("export", "export-file", "external-launcher", "extra", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gpus"),
        *("gpus-per-socket", "gpus-per-task", "gres", "gres-flags", "hint", "ignore-pbs", "kill-on-invalid-dep"),
        *(
            "mail-type",
            "mail-user",
            "mcs-label",
            "mem-bind",
            "mem-per-cpu",
            "mem-per-gpu",
            "mincpus",
            "network",
            "nice",
        ),
        *(
            "no-step-tmpfs",
            "oom-kill-step",
            "prefer",
            "priority",
            "power",
            "profile",
            "propagate",
            "reboot",
            "resv-ports",
        ),
        *(
            "segment",
            "sockets-per-node",
            "spread-job",
            "stepmgr",
            "switches",
            "thread-spec",
            "threads-per-core",
            "time-min",
        ),
        *("tmp", "tres-bind", "tres-per-task", "uid", "use-min-nodes", "wait-all-nodes", "wckey", "x11"),
    )
)
_LONG_NAME = re.compile(r"[a-z0-9][a-z0-9_-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]&|*~^()-]+")
_GPU_OPTIONS = ("gpus", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-task")


# ---- what is asked for ----


def requested_gpus(cluster: ClusterConfig) -> int | None:
    """GPUs a node that cluster.slurm asks for; 0: none; None: more or less than can be told from the options."""
    slurm = cluster.slurm
    if slurm.gpus_per_node is not None:
        return split_gpus(slurm.gpus_per_node)[1]
    options = passed(slurm.sbatch)
    asked = [name for name in _GPU_OPTIONS if "gpu" in name or "gpu" in str(options.get(name, ""))]
    for name in (name for name in asked if name in options):
        return _count(name, str(options[name]), cluster.nodes)
    return 0


def _count(option: str, value: str, nodes: int) -> int | None:
    """GPUs a node of one option's value; None where they can't be told."""
    try:
        if option == "gres":
            return sum(_gres_gpus(entry) for entry in value.split(",") if _is_gpu(entry))
        total = sum(split_gpus(part)[1] for part in value.split(","))
    except ValueError:
        return None
    if option == "gpus":
        return total // nodes if total % nodes == 0 else None
    return total if option == "gpus-per-task" else None


def _is_gpu(entry: str) -> bool:
    return entry.partition(":")[0] in ("gpu", "gres/gpu")


def _gres_gpus(entry: str) -> int:
    """`gpu`, `gpu:4`, `gpu:a100`, `gpu:a100:4`."""
    last = entry.rpartition(":")[2]
    return int(last) if last.isdigit() else 1


def passed(options: Mapping[str, str | bool]) -> dict[str, str | bool]:
    """Those of a pass-through that are really passed on."""
    return {name: value for name, value in options.items() if value is not False}


# ---- rendering ----


def header_options(plan: JobPlan) -> list[str]:
    """What the job asks for, as sbatch's words, in the order of the script's header."""
    slurm = plan.slurm
    asked: dict[str, str | bool] = {"job-name": plan.name, "nodes": str(plan.nodes), "ntasks-per-node": "1"}
    if plan.cpus_per_node:
        asked["cpus-per-task"] = str(plan.cpus_per_node)
    if gres := _gres(plan):
        asked["gres"] = gres
    asked |= {name: value for name in _TYPED if (value := getattr(slurm, name)) is not None}
    asked |= {name: value for name, value in passed(slurm.sbatch).items() if name not in asked}
    if slurm.no_kill:
        asked["no-kill"] = True
    asked["requeue" if slurm.on_stop == "requeue" else "no-requeue"] = True
    asked["signal"] = slurm.signal or "B:USR1@120"
    asked["open-mode"] = "append"
    asked.setdefault("export", "ALL")
    return words(asked)


def submit_options(plan: JobPlan) -> list[str]:
    """What `launch` adds on sbatch's command line: the log lies in the run directory, which a script that is submitted
    by hand may be the first to make."""
    return [f"--output={filename_pattern(str(RunDir(plan.run_dir).path / 'logs'))}/slurm-%j.log"]


def filename_pattern(path: str) -> str:
    """`path` as itself where sbatch expands `%j` and the like."""
    return path.replace("%", "%%")


def srun_options(slurm: SlurmConfig) -> list[str]:
    """The user's own options for the srun that starts the agents."""
    return words(passed(slurm.srun))


def words(options: Mapping[str, str | bool]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def _gres(plan: JobPlan) -> str:
    """GPUs by --gres, which every way of selecting nodes knows; other generic resources of the pass-through with them,
    because sbatch takes the last --gres only."""
    other = str(passed(plan.slurm.sbatch).get("gres", ""))
    if any(option in passed(plan.slurm.sbatch) for option in _GPU_OPTIONS if option != "gres") or any(
        map(_is_gpu, other.split(","))
    ):
        return other
    kind = split_gpus(plan.slurm.gpus_per_node)[0] if plan.slurm.gpus_per_node else ""
    gpus = ":".join(filter(None, ("gpu", kind, str(plan.gpus_per_node)))) if plan.gpus_per_node else ""
    return ",".join(filter(None, (gpus, other)))


def directive(option: str) -> str:
    """The `#SBATCH` line of one option. sbatch unquotes it by rules of its own: quotes of both kinds, and a backslash
    before any character, between quotes too."""
    name, equals, value = option.partition("=")
    if not equals or _PLAIN.fullmatch(value):
        return f"#SBATCH {option}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH {name}="{escaped}"'


# ---- problems ----


def check_options(cluster: ClusterConfig) -> Found:
    """What is wrong with cluster.slurm, each with its key."""
    yield from _check_passed("cluster.slurm.sbatch", cluster.slurm.sbatch)
    yield from _check_srun(cluster.slurm)
    yield from _check_values(cluster.slurm)
    yield from _check_gpus(cluster)
    yield from _check_together(cluster)


def _check_passed(key: str, options: Mapping[str, str | bool]) -> Found:
    for name, value in passed(options).items():
        place = f"{key}.{name}"
        if complaint := _name_problem(name, _KNOWN):
            yield place, complaint
        elif name in _ELSEWHERE:
            yield place, f"has a place of its own: {_ELSEWHERE[name]}. Set it there."
        elif name in _OURS:
            yield place, f"is not yours to set: {_OURS[name]}. Leave it out."
        elif complaint := _value_problem(str(value)):
            yield place, complaint


def _check_srun(slurm: SlurmConfig) -> Found:
    for name, value in passed(slurm.srun).items():
        place = f"cluster.slurm.srun.{name}"
        if complaint := _name_problem(name, frozenset()):
            yield place, complaint
        elif name in _SRUN_OURS:
            yield place, "is set by dtrain, which starts one agent a node. Leave it out."
        elif complaint := _value_problem(str(value)):
            yield place, complaint


def _name_problem(name: str, known: frozenset[str]) -> str:
    """Abbreviations would get around the look for options that are set twice."""
    bare = name.lstrip("-")
    if bare in _SHORT and (len(bare) == 1):
        return f"expects the long name of the option: {_SHORT[bare]}."
    if bare != name and _LONG_NAME.fullmatch(bare):
        return f"expects the option without dashes: {bare}."
    if not _LONG_NAME.fullmatch(name):
        return "is no name of an option. For example: mail-type: END"
    if "_" in name and name.replace("_", "-") in known:
        return f"expects the option as sbatch writes it: {name.replace('_', '-')}."
    longer = sorted(option for option in known if option.startswith(name) and name not in known)
    return f"is short for {longer[0]}. Write it out." if longer else ""


def _value_problem(value: str) -> str:
    bad = next((character for character in value if ord(character) < 32 or ord(character) == 127), None)
    if bad is not None:
        return f"has the control character U+{ord(bad):04X} in it, which a #SBATCH line can't hold. Leave it out."
    return "" if value else "is empty. Give a value, true for an option without one, or leave it out."


def _check_values(slurm: SlurmConfig) -> Found:
    for name in (*_TYPED, "signal"):
        value = getattr(slurm, name)
        if value is not None and (complaint := _value_problem(value)):
            yield f"cluster.slurm.{name}", complaint


def _check_gpus(cluster: ClusterConfig) -> Found:
    slurm, key = cluster.slurm, "cluster.slurm.sbatch"
    options = passed(slurm.sbatch)
    named = [name for name in _GPU_OPTIONS if "gpu" in name or "gpu" in str(options.get(name, ""))]
    named = [name for name in named if name in options]
    for name in named[1:]:
        yield f"{key}.{name}", f"asks for GPUs, as {named[0]} does. Leave one of the two out."
    if named and slurm.gpus_per_node is not None:
        yield f"{key}.{named[0]}", "asks for GPUs, as cluster.slurm.gpus_per_node does. Leave one of the two out."
        return
    asked, wanted = requested_gpus(cluster), cluster.gpus_per_node
    place = "cluster.slurm.gpus_per_node" if slurm.gpus_per_node is not None else f"{key}.{named[0] if named else ''}"
    if asked is None and wanted == "auto":
        yield place, "how many GPUs a node that is can't be told. Set cluster.gpus_per_node as well."
    elif wanted != "auto" and asked not in (None, wanted) and (named or slurm.gpus_per_node is not None):
        yield place, f"asks for {asked} GPUs a node, but cluster.gpus_per_node is {wanted}. Leave one of the two out."


def _check_together(cluster: ClusterConfig) -> Found:
    options = passed(cluster.slurm.sbatch)
    memory = [name for name in ("mem-per-cpu", "mem-per-gpu") if name in options]
    if memory and (cluster.slurm.mem is not None or len(memory) > 1):
        other = "cluster.slurm.mem" if cluster.slurm.mem is not None else memory[1]
        yield f"cluster.slurm.sbatch.{memory[0]}", f"sbatch takes it or {other}, not both. Leave one out."
    export = str(options.get("export", "ALL"))
    if cluster.secrets and "ALL" not in export.split(","):
        yield (
            "cluster.slurm.sbatch.export",
            f"{export} keeps cluster.secrets from the job, whose environment they come by. Say ALL, or leave it out.",
        )
