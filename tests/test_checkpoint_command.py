"""`dtrain ckpt ls`, `show` and `verify`, as a person or a script calls them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.launcher.commands import ckpt, ckpt_show
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import claim_attempt
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.manifest import BoxesRule, GridRule, TensorInfo
from dtrain.strategies.boxes import Box, TensorSpec, replicated, whole


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    ckpt.add_arguments(parser)
    return ckpt.run(parser.parse_args(words))


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    """runs/x/checkpoints: steps 1 and 2 by attempt 1, of which 2 is dead, and 2 again by attempt 2."""
    store = FileStorage(str(tmp_path / "runs" / "x" / "checkpoints"))
    claim_attempt(store, host="h", job_id="j")
    save(store, 1, 1)
    save(store, 2, 1)
    claim_attempt(store, host="h", job_id="j", skip=frozenset({(2, 1)}))
    save(store, 2, 2)
    return store


def save(store: FileStorage, step: int, attempt: int) -> None:
    specs = [TensorSpec(name="model.w", dtype="F32", shape=(10,), layout=replicated(1, 1))]
    checkpointer = Checkpointer(
        store, attempt=attempt, rank=0, world_size=1, strategy={"name": "ddp"}, board=LocalBoard(),
        on_commit=lambda done: None, keep=None,
    )  # fmt: skip
    checkpointer.save(step, specs, {"model.w": [(whole((10,)), torch.ones(10))]}, {})
    checkpointer.wait()


def flip(store: FileStorage, step: int, attempt: int, name: str) -> None:
    path = store.root / names.step_dir(step, attempt) / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("where", ["runs/x", "runs/x/checkpoints", "URL"])
def test_ls_json_is_the_documented_record(store: FileStorage, capsys: pytest.CaptureFixture[str], where: str) -> None:
    assert run("ls", store.url if where == "URL" else where, "--json") == 0
    rows = printed(capsys)
    assert [(row["step"], row["attempt"], row["live"]) for row in rows] == [(1, 1, True), (2, 1, False), (2, 2, True)]
    row = rows[0]
    assert row.pop("committed_at") > 1e9
    assert row.pop("bytes") > 40
    assert row == {
        "step": 1,
        "attempt": 1,
        "live": True,
        "url": f"{store.url}/step-00000001-a0001",
        "strategy": "ddp",
        "world_size": 1,
        "damage": None,
        "metrics": None,
        "best": False,
    }


def test_ls_for_a_person(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    flip(store, 2, 1, "manifest.json")
    assert run("ls", "runs/x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert store.url in lines[0]
    assert lines[1].split() == ["STEP", "ATTEMPT", "STATE", "SIZE", "STRATEGY", "RANKS", "COMMITTED"]
    assert lines[2].split()[:3] == ["1", "1", "live"]
    assert lines[3].split()[:5] == ["2", "1", "dead,", "damaged", "?"]
    assert lines[4].split()[:3] == ["2", "2", "newest"]
    assert lines[5] == "damaged: step-00000002-a0001: manifest.json is damaged: its content does not match its digest"
    assert "never loaded" in lines[6]


def test_ls_says_what_is_missing(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that lacks a file is not where a run goes on."""
    directory = store.root / names.step_dir(2, 2)
    (directory / "rank-00000.index.json").unlink()
    with (directory / "rank-00000.safetensors").open("ab") as file:
        file.write(b"more")
    assert run("ls", "runs/x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["1", "1", "newest"]
    assert lines[4].split()[:4] == ["2", "2", "live,", "damaged"]
    assert lines[5].startswith(f"damaged: {directory.name}: rank-00000.safetensors has ")
    assert lines[6] == f"damaged: {directory.name}: rank-00000.index.json is missing"
    assert run("ls", "runs/x", "--json") == 0
    row = printed(capsys)[-1]
    assert row["live"]
    assert row["damage"].endswith("; rank-00000.index.json is missing")


def test_show_says_what_a_checkpoint_holds(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "runs/x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{store.url}/step-00000002-a0002"
    assert "step 2 of attempt 2" in lines[1]
    assert lines[1].endswith("live")
    assert lines[-1].split() == ["model.w", "F32", "10", "40", "B", "whole,", "by", "rank", "0"]
    assert run("show", "runs/x", "--step", "1", "--json") == 0
    found = printed(capsys)
    assert (found["step"], found["attempt"], found["damage"]) == (1, 1, None)
    assert found["tensors"] == [
        {"name": "model.w", "dtype": "F32", "shape": [10], "bytes": 40, "layout": "whole, by rank 0"}
    ]
    assert [file["key"] for file in found["files"]] == ["step-00000001-a0001/rank-00000.safetensors"]
    (store.root / found["files"][0]["key"]).unlink()
    assert run("show", "runs/x", "--step", "1") == 0
    assert "  DAMAGED: rank-00000.safetensors is missing" in capsys.readouterr().out


LAYOUTS: dict[str, GridRule | BoxesRule] = {
    "whole, by rank 0": GridRule(parts=(1, 1), writers=((0, 1),)),
    "4 x 1 parts, by ranks 0-1, 6-7": GridRule(parts=(4, 1), writers=((6, 2), (0, 2))),
    "2 boxes, by ranks 0, 2": BoxesRule(boxes=((0, Box((0, 0), (1, 8))), (2, Box((1, 0), (3, 8))))),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_a_layout_in_words(words: str) -> None:
    assert ckpt_show.layout_words(TensorInfo(dtype="F32", shape=(4, 8), layout=LAYOUTS[words])) == words


def test_nothing_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = (tmp_path / "nowhere").as_uri()
    assert run("ls", url) == 0
    assert capsys.readouterr().out == f"No checkpoints in {url}.\n"
    assert run("ls", url, "--json") == 0
    assert printed(capsys) == []
    with pytest.raises(CheckpointError, match="Committed steps: none"):
        run("verify", url)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_run_and_no_directory_is_refused() -> None:
    with pytest.raises(UsageError, match="Nor is nonsense a directory"):
        run("ls", "nonsense")


def test_verify_says_what_it_read(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "runs/x") == 0
    assert capsys.readouterr().out.startswith("Step 2 of attempt 2 is whole: 1 tensor, ")


def test_verify_names_file_and_tensor(store: FileStorage, capsys: pytest.CaptureFixture[str]) -> None:
    flip(store, 2, 2, "rank-00000.safetensors")
    assert run("verify", "runs/x") == 1
    out = capsys.readouterr().out
    assert "step-00000002-a0002/rank-00000.safetensors: tensor model.w does not match its checksum in block 0" in out
    assert run("verify", "runs/x", "--json") == 1
    report = printed(capsys)
    assert (report["step"], report["attempt"]) == (2, 2)
    assert [(found["file"], found["tensor"]) for found in report["damages"]] == [("rank-00000.safetensors", "model.w")]
    assert run("verify", "runs/x", "--step", "1") == 0
    assert run("verify", "runs/x", "--step", "2", "--attempt", "1") == 0  # dead ones on request


def test_verify_of_a_step_that_is_not_there(store: FileStorage) -> None:
    with pytest.raises(CheckpointError, match=r"of step 9 .* Committed steps: 1 \(attempt 1\), 2"):
        run("verify", "runs/x", "--step", "9")
