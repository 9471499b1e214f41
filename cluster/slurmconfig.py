"""The sections `cluster.slurm` and `cluster.container`: what a Slurm job asks for. Their fields only; what sbatch makes
of them is slurm/options.py's, the script slurm/script.py's. Here, because a JobPlan holds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

# sbatch(1), --time; UNLIMITED is what scontrol prints for none.
_TIME = re.compile(
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"
    r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)"
    r"|(?P<days>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?",
)
_GPUS = re.compile(r"(?:(?P<kind>[A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*):)?(?P<count>\d+)")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_SIGNAL = re.compile(r"([BR]{1,2}:)?(\d+|[A-Z][A-Z0-9+]*)(@\d+)?")


def time_limit_s(text: str) -> int | None:
    """Seconds of a time as sbatch takes it; None: no limit. Raises ValueError with what to do."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(
            f'expects minutes, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, found "{text}". For example: time: 1-12:00:00'
        )
    part = {name: int(value) for name, value in found.groupdict(default="0").items()}
    hours, minutes = part["h"] + part["dh"], part["minutes"] + part["m"] + part["dm"]
    return ((part["days"] * 24 + hours) * 60 + minutes) * 60 + part["seconds"] + part["s"] + part["ds"]


def split_gpus(text: str) -> tuple[str, int]:
    """`a100:4` -> ("a100", 4); `4` -> ("", 4). Raises ValueError with what to do."""
    found = _GPUS.fullmatch(text)
    if found is None:
        raise ValueError(f'expects a number, or a type and a number like a100:4, found "{text}".')
    return found["kind"] or "", int(found["count"])


def _check_time(text: str) -> None:
    if time_limit_s(text) == 0:
        raise ValueError("0 minutes are no time to train. Leave it out for the partition's default.")


def _check_gpus(text: str) -> None:
    split_gpus(text)


def _check_memory(text: str) -> None:
    if not _MEMORY.fullmatch(text):
        raise ValueError(f'expects megabytes, or a number with K, M, G or T, found "{text}". For example: mem: 64G')


def _check_signal(text: str) -> None:
    if not _SIGNAL.fullmatch(text):
        raise ValueError(
            f'expects a signal and the seconds before the end at which it is sent, found "{text}". '
            "For example: signal: B:USR1@300"
        )


def _text(doc: str, validate: Any = None) -> Any:
    return field(default=None, metadata={"doc": doc} if validate is None else {"doc": doc, "validate": validate})


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmConfig:
    """What `backend: slurm` asks sbatch for; other back ends leave it alone, so that a site's file may set it."""

    partition: str | None = _text("where the job waits; several with commas. Left out: the cluster's default")
    account: str | None = _text("who pays")
    qos: str | None = _text("quality of service")
    time: str | None = _text(
        "time limit: minutes, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; left out: the partition's", _check_time
    )
    gpus_per_node: str | None = _text(
        "like a100:4, where the type matters; else cluster.gpus_per_node says it", _check_gpus
    )
    mem: str | None = _text("memory a node, like 64G; 0: all of it", _check_memory)
    constraint: str | None = _text("features that the nodes must have")
    nodelist: str | None = _text("nodes that the job must have, like gpu[1-4]")
    exclude: str | None = _text("nodes that it must not have; dtrain adds those that failed")
    reservation: str | None = _text("a reservation to run in")
    dependency: str | None = _text("what the job waits for, like afterok:1234")
    signal: str | None = _text(
        "a signal before the time limit, like B:USR1@300; left out: one at 120 s (a quarter of a short job), a reserve "
        "for the stop that dtrain plans from the measured time of a save",
        _check_signal,
    )
    no_kill: bool = field(default=False, metadata={"doc": "keep the other nodes when one fails (sbatch --no-kill)"})
    on_stop: Literal["requeue", "resubmit", "none"] = field(
        default="requeue",
        metadata={
            "doc": "after a time limit or preemption: put the job back into the queue, submit it anew where the site "
            "forbids that, or leave it stopped"
        },
    )
    sbatch: dict[str, str | bool] = field(
        default_factory=dict,
        metadata={
            "doc": "any other option of sbatch, by its long name without dashes: {mail-type: END, exclusive: true}; "
            "false leaves out what a site's file sets"
        },
    )
    srun: dict[str, str | bool] = field(
        default_factory=dict,
        metadata={"doc": "likewise, options of the srun that starts an agent on each node"},
    )

    @staticmethod
    def from_json(data: dict[str, Any]) -> SlurmConfig:
        return SlurmConfig(**{name: data[name] for name in SlurmConfig.__dataclass_fields__ if name in data})


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerConfig:
    """The image in which the nodes' processes run; `setup` runs inside it."""

    image: str = field(metadata={"doc": "as the runtime takes it: a file, or a registry's name like docker://..."})
    runtime: Literal["pyxis", "apptainer"] = field(
        metadata={"doc": "pyxis: srun --container-image (the cluster has the plugin); apptainer: its command"}
    )
    mounts: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "folders to see inside, SRC, SRC:DST or SRC:DST:FLAGS; those of the run, your code, file:// "
            "checkpoints and the Python are added"
        },
    )

    @staticmethod
    def from_json(data: dict[str, Any]) -> ContainerConfig:
        known = {name: data[name] for name in ContainerConfig.__dataclass_fields__ if name in data}
        return ContainerConfig(**{**known, "mounts": tuple(known.get("mounts", ()))})
