"""Models of Hugging Face's, unchanged: every layout learns what one process learns, weights come from their folders
and go back into them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import Run, events, losses, needs, rank_runner
from torch import nn
from torch.utils.data import default_collate

from dtrain.cluster.storage import open_storage
from dtrain.runtime.checkpoint.attempts import claim_attempt
from dtrain.runtime.checkpoint.loader import load_model
from dtrain.runtime.export import Request, export

needs("transformers", "needs transformers: pip install 'dtrain[hf]'", module=True)

ASSETS = Path(__file__).parent / "assets"
STEPS = 12
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
MODELS = {  # and the auto class that opens its folders
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hf() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ASSETS))
        yield importlib.import_module("hf")


@pytest.fixture(scope="module")
def run() -> Run:
    preload = ["hf", *(["deepspeed"] if DEEPSPEED else [])]
    return rank_runner({"DS_ACCELERATOR": "cpu"}, preload=preload)


def prepare(folder: Path, name: str, *overrides: str, model: dict[str, Any] | None = None) -> Path:
    base = {
        "model": model or {"_target_": "hf.from_config", "name": name},
        "data": {"train": {"_target_": "hf.Samples", "name": name}, "batch_size": 5},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.003},
        "train": {"steps": STEPS, "clip_grad_norm": 1.0, "micro_batch": 2},
    }
    return cases.prepare(folder, *overrides, base=base)


def event(folder: Path, kind: str) -> dict[str, Any]:
    (found,) = events(folder, kind)
    assert isinstance(found, dict)
    return found


def failure(folder: Path) -> str:
    return str(cases.failure(folder)["message"])


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_losses_of_one_process(run: Run, tmp_path: Path, name: str) -> None:
    one = prepare(tmp_path / "one", name, "strategy=single")
    assert run(one, 1) == [0]
    wanted = losses(one)
    assert wanted[-1] < wanted[0]
    for strategy in ("ddp", "fsdp", "zero3")[: 3 if DEEPSPEED else 2]:
        folder = prepare(tmp_path / strategy, name, f"strategy={strategy}", "cluster.procs_per_node=2")
        assert run(folder, 2) == [0, 0]
        assert losses(folder) == pytest.approx(wanted, rel=1e-6), strategy


@pytest.fixture(scope="module")
def folders(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a model, written by save_pretrained() in several files."""
    root = tmp_path_factory.mktemp("folders")
    for number, name in enumerate(MODELS):
        torch.manual_seed(100 + number)
        hf.from_config(name).save_pretrained(root / name, max_shard_size="60KB")
        assert len(list((root / name).glob("*.safetensors"))) > 1
    return root


def open_folder(folder: Path, name: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    model: nn.Module = getattr(transformers, MODELS[name]).from_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_fine_tuning_begins_where_from_pretrained_would(
    run: Run, hf: Any, folders: Path, tmp_path: Path, name: str, strategy: str
) -> None:
    model = {"_target_": "hf.from_folder", "auto": MODELS[name], "folder": str(folders / name)}
    overrides = [f"model.init_from={folders / name}", "data.batch_size=64", "train.steps=2", "train.micro_batch=32"]
    folder = prepare(tmp_path / "run", name, *overrides, f"strategy={strategy}", model=model)
    assert run(folder, 2) == [0, 0]
    reference = open_folder(folders / name, name)
    with torch.no_grad():  # the data set has 64 samples: the first step saw all of them
        wanted = reference(**default_collate([hf.Samples(name)[i] for i in range(64)])).loss
    assert losses(folder)[0] == pytest.approx(float(wanted), rel=1e-6)
    said = event(folder, "initialized")
    assert said["tensors"] == len(list(reference.parameters()))
    assert [said[kind]["count"] for kind in ("fresh", "replaced", "unexpected")] == [0, 0, 0]
    assert any(line.startswith("weights ") for line in event(folder, "chosen")["lines"])


def inputs(hf: Any, name: str) -> dict[str, Any]:
    batch: dict[str, Any] = default_collate([hf.Samples(name)[i] for i in range(4)])
    return {key: value for key, value in batch.items() if key != "labels"}


def request(run_dir: Path, folder: Path, **more: Any) -> Request:
    folder.mkdir()
    settings: dict[str, Any] = {"form": "hf", "dtype": None, "config": None, "run_dir": str(run_dir), **more}
    url = str(run_dir / "checkpoints")
    return Request(checkpoint_url=url, step=2, attempt=1, folder=str(folder), sys_path=(), **settings)


@pytest.fixture(scope="module")
def trained(run: Run, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run directory of two steps of fine-tuning on 2 ranks, made when it is first asked for."""
    root = tmp_path_factory.mktemp("trained")

    def train(name: str) -> Path:
        if not (root / name).exists():
            model = {"_target_": "hf.from_folder", "auto": MODELS[name], "folder": str(folders / name)}
            init = f"model.init_from={folders / name}"
            folder = prepare(root / name, name, init, "train.steps=2", "strategy=fsdp", model=model)
            claim_attempt(open_storage(str(folder / "checkpoints")), host="here", job_id="case")
            assert run(folder, 2) == [0, 0]
        return root / name

    return train


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_folder_is_what_was_trained(
    hf: Any, folders: Path, trained: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Opened by transformers, it gives the same bits; and its tensors are called as save_pretrained() calls them."""
    (folders / name / "tokenizer_config.json").write_text("{}")
    told = export(request(trained(name), tmp_path / "out"))
    assert told["tensors"] == len(list(open_folder(folders / name, name).parameters()))
    wanted = hf.from_folder(MODELS[name], str(folders / name)).eval()
    load_model(str(trained(name) / "checkpoints"), wanted)
    found, before = open_folder(tmp_path / "out", name), open_folder(folders / name, name)
    with torch.no_grad():
        logits = [model(**inputs(hf, name)).logits for model in (found, wanted, before)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2]), "two steps have changed it"
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    original = json.loads((folders / name / "model.safetensors.index.json").read_text())["weight_map"]
    with importlib.import_module("safetensors").safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(original)


def test_an_export_in_several_files_and_another_dtype(hf: Any, trained: Callable[[str], Path], tmp_path: Path) -> None:
    told = export(request(trained("gpt2"), tmp_path / "out", file_bytes=40_000, dtype="bf16"))
    assert sum(name.endswith(".safetensors") for name in told["files"]) > 1
    found, wanted = open_folder(tmp_path / "out", "gpt2"), hf.from_config("gpt2")
    load_model(str(trained("gpt2") / "checkpoints"), wanted)
    for (name, here), there in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert here.dtype == torch.bfloat16
        assert torch.equal(here, there.to(torch.bfloat16)), name


def test_an_export_trains_on(run: Run, hf: Any, trained: Callable[[str], Path], tmp_path: Path) -> None:
    export(request(trained("bert"), tmp_path / "out", form="safetensors"))
    folder = prepare(tmp_path / "run", "bert", f"model.init_from={tmp_path / 'out'}", "train.steps=1")
    assert run(folder, 1) == [0]
    assert event(folder, "initialized")["tensors"] == len(list(hf.from_config("bert").parameters()))


def test_export_without_the_run_needs_a_config(trained: Callable[[str], Path], folders: Path, tmp_path: Path) -> None:
    wanted = request(trained("gpt2"), tmp_path / "out", config=str(folders / "gpt2"))
    export(dataclasses.replace(wanted, run_dir=None))
    assert open_folder(tmp_path / "out", "gpt2")


def test_a_new_head_starts_fresh(run: Run, folders: Path, tmp_path: Path) -> None:
    """A classifier of 7 classes from one of 5: refused with the key to set, and then done."""
    model = {"_target_": "hf.from_config", "name": "vit", "num_labels": 7}
    refused = prepare(tmp_path / "refused", "vit", f"model.init_from={folders / 'vit'}", model=model)
    assert run(refused, 2) == [93, 93]
    assert "classifier.weight: [5, 32] there, [7, 32] here" in failure(refused)
    model["init_from"] = {"url": str(folders / "vit"), "fresh": ["classifier.*"]}
    model["frozen"] = ["vit.embeddings.*"]
    folder = prepare(tmp_path / "run", "vit", "train.steps=2", model=model)
    assert run(folder, 2) == [0, 0]
    assert event(folder, "initialized")["replaced"]["names"] == ["classifier.weight", "classifier.bias"]
    assert "frozen" in event(folder, "chosen")["lines"][0]
