"""The agents inside of an image: what srun is told (pyxis) or what stands before the agent's shell (apptainer), and the
folders that are mounted. Pure; srun's other words are slurm/steps.py's.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.jobplan import ClusterConfig, JobPlan
from dtrain.cluster.slurmconfig import ContainerConfig
from dtrain.cluster.storage import folder_of

_IMAGES_OWN = ("/", "/usr", "/usr/local", "/bin", "/lib")  # a host's folder there would hide the image's


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapping:
    """Words for srun, and those before what each task runs."""

    srun: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def wrap(plan: JobPlan, python_folders: Sequence[str]) -> Wrapping:
    """`python_folders`: those that make up the host's Python, where the agents run it inside too; else none."""
    container = plan.container
    if container is None:
        return Wrapping()
    mounts = ",".join([*container.mounts, *(f"{folder}:{folder}" for folder in mounted(plan, python_folders))])
    if container.runtime == "pyxis":
        return Wrapping(srun=(f"--container-image={container.image}", f"--container-mounts={mounts}"))
    gpus = ("--nv",) if plan.gpus_per_node else ()
    return Wrapping(before=("apptainer", "exec", *gpus, "--bind", mounts, container.image))


def mounted(plan: JobPlan, python_folders: Sequence[str]) -> list[str]:
    """The folders that a node needs, at the same place inside; those within others are left out."""
    wanted = [plan.run_dir, plan.cwd, *plan.sys_path, *python_folders, *_folders(plan.checkpoint_url)]
    kept: list[str] = []
    for folder in sorted(dict.fromkeys(map(os.path.normpath, wanted)), key=len):
        if not any(Path(folder).is_relative_to(outer) for outer in kept):
            kept.append(folder)
    return kept


def _folders(url: str) -> list[str]:
    return [folder] if (folder := folder_of(url)) is not None else []


def python_folders(python: str) -> tuple[str, ...]:
    """Where this Python and its packages lie, if it is what the agents run; an image's own Python needs none."""
    if python != sys.executable:
        return ()
    code = str(Path(__file__).resolve().parent.parent)  # not below the environment where dtrain was installed editable
    libraries = sysconfig.get_paths()
    places = (sys.prefix, sys.base_prefix, sys.exec_prefix, libraries["purelib"], libraries["platlib"], code)
    return tuple(dict.fromkeys(place for place in places if place not in _IMAGES_OWN))


def has_own_python(container: ContainerConfig | None, python: str) -> bool:
    """Whether the agents run a Python of the image, so that nobody can look at it from here."""
    return container is not None and python != sys.executable


def check_container(cluster: ClusterConfig, run_dir: str, checkpoint_url: str) -> Iterator[tuple[str, str]]:
    """Problems, each with its key."""
    container = cluster.container
    if container is None:
        return
    if not container.image.strip():
        yield "cluster.container.image", "is empty. Name the image."
    for index, mount in enumerate(container.mounts):
        place = f"cluster.container.mounts.{index}"
        if "," in mount or not all(mount.split(":")):
            yield place, f"expects SRC, SRC:DST or SRC:DST:FLAGS without commas, found {mount}."
        elif not mount.startswith("/"):
            yield place, f"expects an absolute path, found {mount}."
    for key, path in (("run_dir", run_dir), *(("checkpoint.url", path) for path in _folders(checkpoint_url))):
        if "," in path or ":" in path:
            yield (
                key,
                f"{path} is to be mounted into a container, which takes no commas and colons in a path. Rename it.",
            )
    if cluster.python == "auto" and sys.base_prefix in _IMAGES_OWN:
        yield (
            "cluster.python",
            f"auto is {sys.executable}, which needs this host's {sys.base_prefix}, and the image has its own. Give the "
            "path of a Python inside of the image that has dtrain.",
        )
