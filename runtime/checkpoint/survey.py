"""What can be said of every checkpoint in a store without reading its tensors: its manifest, and whether the files that
it names are there with the sizes that it says. Torch-free; verify.py reads every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dtrain.cluster.errors import CheckpointError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.read import read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """`manifest` is None where it can't be read. `damages`: "rank-00001.safetensors is missing", in file order."""

    info: CheckpointInfo
    manifest: Manifest | None
    damages: tuple[str, ...]


def survey(storage: Storage) -> list[Surveyed]:
    """Every committed checkpoint, by step and then attempt; one request a manifest, and one listing of everything."""
    infos = live_checkpoints(storage)
    sizes = {found.key: found.size_bytes for found in storage.list("step-")} if infos else {}
    return [_look_at(storage, info, sizes) for info in infos]


def newest_whole(found: list[Surveyed]) -> Surveyed | None:
    """The newest live one of which nothing is known to be missing: where a run goes on."""
    fitting = (one for one in found if one.info.live and not one.damages)
    return max(fitting, key=lambda one: (one.info.step, one.info.attempt), default=None)


def file_damages(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[str]:
    """`sizes`: key -> bytes of what lies in the directories that the manifest names."""
    for file in manifest.files:
        found = sizes.get(manifest.key(file, file.name))
        if found is None:
            yield f"{file.name} is missing"
        elif found != file.size_bytes:
            yield f"{file.name} has {found} bytes, not {file.size_bytes}"
        if manifest.key(file, file.index) not in sizes:
            yield f"{file.index} is missing"


def _look_at(storage: Storage, info: CheckpointInfo, sizes: Mapping[str, int]) -> Surveyed:
    try:
        manifest = read_manifest(storage, info.step, info.attempt)
    except CheckpointError as error:
        return Surveyed(info=info, manifest=None, damages=(_without_place(str(error), info),))
    return Surveyed(info=info, manifest=manifest, damages=tuple(file_damages(manifest, sizes)))


def _without_place(words: str, info: CheckpointInfo) -> str:
    return words.removeprefix(f"{info.dir}/")
