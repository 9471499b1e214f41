"""SlurmConfig -> options of sbatch and srun, and how a `#SBATCH` line quotes them. Pure. What must not be asked for is
slurm/optionchecks.py's, the script around them slurm/script.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.slurmconfig import SlurmConfig, split_gpus, time_limit_s
from dtrain.slurm.hostlist import compress, expand

# Typed keys that are an option of the same name.
TYPED = ("partition", "account", "qos", "time", "mem", "constraint", "nodelist", "exclude", "reservation", "dependency")
_GPU_OPTIONS = ("gpus", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-task")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]&|*~^()-]+")
_LONG = 1000  # characters of a list of nodes


# ---- what is asked for ----


def requested_gpus(cluster: ClusterConfig) -> int | None:
    """GPUs a node that cluster.slurm asks for; 0: none; None: more or less than can be told from the options."""
    slurm = cluster.slurm
    if slurm.gpus_per_node is not None:
        return split_gpus(slurm.gpus_per_node)[1]
    asking = gpu_options(slurm.sbatch)
    return _count(asking[0], str(slurm.sbatch[asking[0]]), cluster.nodes) if asking else 0


def gpu_options(options: Mapping[str, str | bool]) -> list[str]:
    """Those of a pass-through that ask for GPUs."""
    return [name for name in _GPU_OPTIONS if "gpu" in f"{name}={options.get(name, '')}" and name in passed(options)]


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
    asked |= {name: _short(name, value) for name in TYPED if (value := getattr(slurm, name)) is not None}
    asked |= {name: value for name, value in passed(slurm.sbatch).items() if name not in asked}
    if slurm.no_kill:
        asked["no-kill"] = True
    asked["requeue" if slurm.on_stop == "requeue" else "no-requeue"] = True
    asked["signal"] = slurm.signal or f"B:USR1@{_reserve_s(slurm)}"
    asked["open-mode"] = "append"
    asked.setdefault("export", "ALL")
    return words(asked)


def _reserve_s(slurm: SlurmConfig) -> int:
    """Two minutes, but a quarter of a short job: Slurm would send the signal at once."""
    limit_s = None if slurm.time is None else time_limit_s(slurm.time)
    return 120 if limit_s is None else min(120, limit_s // 4)


def _short(name: str, value: str) -> str:
    """Long lists of nodes by their short form; a path of a file that has them stays one."""
    if name not in ("nodelist", "exclude") or len(value) < _LONG or "/" in value:
        return value
    return compress(expand(value))


def submit_options(plan: JobPlan) -> list[str]:
    """What `launch` adds on sbatch's command line: the job's log lies in the run directory, whose folder `logs` must be
    there. Not in the header, because a script that is submitted by hand may be the first to make it."""
    return [f"--output={log_pattern(str(RunDir(plan.run_dir).path / 'logs'))}"]


def log_pattern(folder: str) -> str:
    """slurm-<job>.log in `folder` as sbatch writes file names: `%j` is the job's number and `%%` a percent sign; with a
    backslash anywhere nothing is expanded, and then all jobs of the run share slurm.log."""
    if "\\" in folder:
        return folder.replace("\\", "\\\\") + "/slurm.log"
    return folder.replace("%", "%%") + "/slurm-%j.log"


def srun_options(slurm: SlurmConfig) -> list[str]:
    """The user's own options for the srun that starts the agents."""
    return words(passed(slurm.srun))


def words(options: Mapping[str, str | bool]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def _gres(plan: JobPlan) -> str:
    """GPUs by --gres, which every way of selecting nodes knows; other generic resources of the pass-through with them,
    because sbatch takes the last --gres only."""
    other = str(passed(plan.slurm.sbatch).get("gres", ""))
    if gpu_options(plan.slurm.sbatch):
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
