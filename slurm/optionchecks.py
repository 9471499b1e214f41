"""What is wrong with cluster.slurm, found when the config is: an option that is asked for twice, that is dtrain's own
affair, or that a script can't hold. Pure; whether the cluster can give it, sbatch says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.secretrefs import parse_secrets
from dtrain.cluster.slurmconfig import SlurmConfig
from dtrain.slurm.hostlist import expand
from dtrain.slurm.options import TYPED, gpu_options, passed, requested_gpus

Found = Iterator[tuple[str, str]]  # key, message

# Options with a place of their own, which `sbatch:` therefore must not set.
_ELSEWHERE = {
    **{name: f"cluster.slurm.{name}" for name in (*TYPED, "signal")},
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
    "mpi", "distribution",
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
_OTHERS = {
    "acctg-freq", "batch", "bb", "bbf", "begin", "burst-buffer", "cluster-constraint", "comment", "contiguous",
    "cores-per-socket", "cpu-freq", "cpus-per-gpu", "deadline", "delay-boot", "exclusive", "export", "export-file",
    "external-launcher", "extra", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gpus", "gpus-per-socket",
    "gpus-per-task", "gres", "gres-flags", "hint", "ignore-pbs", "kill-on-invalid-dep", "mail-type", "mail-user",
    "mcs-label", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "oom-kill-step", "prefer",
    "priority", "power", "profile", "propagate", "reboot", "resv-ports", "segment", "sockets-per-node", "spread-job",
    "stepmgr", "switches", "thread-spec", "threads-per-core", "time-min", "tmp", "tres-bind", "tres-per-task", "uid",
    "use-min-nodes", "wait-all-nodes", "wckey", "x11",
}  # fmt: skip
_KNOWN = frozenset((*_ELSEWHERE, *_OURS, *_OTHERS, *_SHORT.values()))
_LONG_NAME = re.compile(r"[a-z0-9][a-z0-9_-]+")


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
    for name in (*TYPED, "signal"):
        value = getattr(slurm, name)
        if value is None:
            continue
        if complaint := _value_problem(value) or (_list_problem(value) if name in ("nodelist", "exclude") else ""):
            yield f"cluster.slurm.{name}", complaint


def _list_problem(nodes: str) -> str:
    try:
        return "" if "/" in nodes or expand(nodes) else "names no node. Leave it out."
    except ValueError as error:
        return f"{error}. For example: gpu[1-4],gpu07"


def _check_gpus(cluster: ClusterConfig) -> Found:
    slurm, key = cluster.slurm, "cluster.slurm.sbatch"
    named = gpu_options(slurm.sbatch)
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
    exported = [secret.name for secret in parse_secrets(cluster.secrets) if secret.path is None]
    if exported and "ALL" not in export.split(","):
        yield (
            "cluster.slurm.sbatch.export",
            f"{export} keeps cluster.secrets from the job, whose environment they come by. Say ALL, leave it out, or "
            f"have them read from files: {exported[0]}=file:PATH",
        )
