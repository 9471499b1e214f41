"""Any layout's checkpoint continues in any other: the whole matrix, weights and optimizer state bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from anylayout import LAYOUTS, SAVED, TOLERANCE
from cases import PARITY, Ask, prepare, rank_functions
from savedstate import tensors_of
from torch import Tensor

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = {"_target_": "parity.Transformer", "vocab": 96, "width": 32, "layers": 4, "heads": 4, "seq": 8}
DATA = {"train": {"_target_": "parity.Tokens", "vocab": 96, "seq": 8}, "batch_size": 12}
BASE: dict[str, Any] = {
    **PARITY,
    "model": MODEL,
    "data": DATA,
    "schedule": {"name": "cosine", "warmup": 2},
    "train": {"steps": 9, "clip_grad_norm": 0.5, "micro_batch": 2},
}
Curves = dict[str, list[list[float]]]


@pytest.fixture(scope="module")
def ask() -> Ask:
    seconds_to_import = [name for name in ("deepspeed",) if importlib.util.find_spec(name)]
    return rank_functions({"DS_ACCELERATOR": "cpu"}, module="anylayout", preload=seconds_to_import)


def folder_of(parent: Path, layout: str) -> Path:
    strategy, size = LAYOUTS[layout]
    return prepare(parent / layout, f"strategy={strategy}", f"cluster.procs_per_node={size}", base=BASE)


@pytest.fixture(scope="module")
def saved(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curves]:
    """Each layout's checkpoint, in a folder of its name, and its curve."""
    parent = tmp_path_factory.mktemp("saved")
    curves = {}
    for layout, (_, size) in LAYOUTS.items():
        found = ask("save", size, folder=str(folder_of(parent, layout)))
        assert all(curve == found[0] for curve in found), layout
        curves[layout] = found[0]
    return parent, curves


def flat(curve: list[list[float]]) -> list[float]:
    return [number for step in curve for number in step]


def test_every_layout_learns_the_same(saved: tuple[Path, Curves]) -> None:
    _, curves = saved
    for layout, curve in curves.items():
        assert flat(curve) == pytest.approx(flat(curves["single"]), rel=TOLERANCE), layout


def reacting(name: str, tensor: Tensor) -> Tensor:
    """Without attention's key biases: no loss reacts to them, and Adam makes full steps of the noise in their
    gradients."""
    if name.startswith("model.") and name.endswith("qkv.bias"):
        query, _, value = tensor.chunk(3)
        tensor = torch.cat([query, value])
    return tensor.double()


def test_every_layout_holds_the_same_tensors(saved: tuple[Path, Curves]) -> None:
    """Of the same names and types; as many optimizer states, in their own precision."""
    parent, _ = saved
    wanted = tensors_of(parent / "single", SAVED, 1)
    for layout in LAYOUTS:
        found = tensors_of(parent / layout, SAVED, 1)
        assert found.keys() == wanted.keys(), layout
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype, (layout, name)
            assert torch.allclose(reacting(name, tensor), reacting(name, wanted[name]), rtol=1e-3, atol=1e-6), (
                layout,
                name,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_from_any_layout(ask: Ask, saved: tuple[Path, Curves], tmp_path: Path, layout: str) -> None:
    parent, curves = saved
    folder = folder_of(tmp_path, layout)
    names = list(LAYOUTS)
    place = names.index(layout)
    # What was loaded is compared for all. How training goes on follows from it and the layout, so three show it: the
    # layout itself, and two others, which differ from row to row.
    trained = [layout, names[(place + 1) % len(names)], names[(place + len(names) // 2) % len(names)]]
    sources = [str(parent / name) for name in names]
    ranks = ask("go_on", LAYOUTS[layout][1], folder=str(folder), sources=sources, trained=trained)
    assert all(found == ranks[0] for found in ranks), ranks[0]
    for source, curve in ranks[0].items():
        before, after = tensors_of(parent / source, SAVED, 1), tensors_of(folder / source, SAVED, 1)
        assert before.keys() == after.keys(), source
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], source
        if source not in trained:
            continue
        wanted = flat(curves[source][SAVED:])
        if source == layout:
            assert flat(curve) == wanted, "the same layout: the same bits"
        assert flat(curve) == pytest.approx(wanted, rel=TOLERANCE), source
