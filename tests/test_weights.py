"""Safetensors files at a URL: what is found in them, what is refused, and which tensor fills which of a model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dtrain.cluster.errors import ConfigError, DtrainError, UsageError
from dtrain.launcher.cli import main
from dtrain.launcher.compose import load_config
from dtrain.runtime.modelconfig import InitConfig
from dtrain.runtime.weightfiles import StoredTensor, find_weights
from dtrain.runtime.weightmatch import Match, Wanted
from dtrain.runtime.weightmatch import match_weights as match

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int64), "none": torch.zeros(0, 4)}


def folder(path: Path, **files: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    return path


def sharded(path: Path) -> Path:
    """Two files and the index that says so."""
    folder(path, one={"a.weight": TENSORS["a.weight"]}, two={"b": TENSORS["b"], "none": TENSORS["none"]})
    places = {"a.weight": "one.safetensors", "b": "two.safetensors", "none": "two.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def raw(stored: StoredTensor, root: Path) -> bytes:
    return (root / stored.file).read_bytes()[stored.begin : stored.end]


@pytest.mark.parametrize("form", ["folder", "url", "file", "index", "other", "file in a link"])
def test_what_a_folder_offers(tmp_path: Path, form: str) -> None:
    if form in ("folder", "url", "file", "file in a link"):
        root = folder(tmp_path / "w", model=TENSORS)
    elif form == "other":  # no index, no model.safetensors
        root = folder(
            tmp_path / "w", x={"a.weight": TENSORS["a.weight"]}, y={"b": TENSORS["b"], "none": TENSORS["none"]}
        )
    else:
        root = sharded(tmp_path / "w")
    if form == "file in a link":  # as the Hugging Face cache has them
        (root / "model.safetensors").rename(tmp_path / "blob")
        (root / "model.safetensors").symlink_to(tmp_path / "blob")
    url = {
        "url": root.as_uri(),
        "file": str(root / "model.safetensors"),
        "index": str(root / "model.safetensors.index.json"),
    }.get(form, str(root))
    found = find_weights(url)
    assert found.url == root.as_uri()
    assert set(found.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found.tensors[name].shape == tuple(tensor.shape)
        assert raw(found.tensors[name], root) == tensor.numpy().tobytes()


def test_a_single_file_wins_over_an_index_and_others(tmp_path: Path) -> None:
    root = sharded(tmp_path / "w")
    save_file({"only": torch.zeros(2)}, root / "model.safetensors")
    assert set(find_weights(str(root)).tensors) == {"only"}


def test_nothing_there_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no model\.safetensors.*There is nothing"):
        find_weights(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        find_weights(str(tmp_path / "not_there"))
    with pytest.raises(UsageError, match="there is no such file"):
        find_weights(str(tmp_path / "empty" / "x.safetensors"))
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pickled weights only.*save_pretrained"):
        find_weights(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="never loaded"):
        find_weights(str(tmp_path / "empty" / "pytorch_model.bin"))
    (tmp_path / "run" / "step-00000001-a0001").mkdir(parents=True)
    (tmp_path / "run" / "step-00000001-a0001" / "manifest.json").write_text("{}")
    for url in (tmp_path / "run", tmp_path / "run" / "step-00000001-a0001"):
        with pytest.raises(UsageError, match="ckpt export"):
            find_weights(str(url))


def header_file(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return str(path)


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "no safetensors file"),
        (b"[1]", "expected an object"),
        (b"{ ", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": {}, "a": {}}', "the same key twice"),
        ({"a": 1}, "expected an object"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "no field 'data_offsets'"),
        ({"a": entry(0, 8, dtype="F7")}, "no element type 'F7'"),
        ({"a": entry(0, 8, [3])}, "does not have the 8 bytes"),
        ({"a": entry(0, 8, [-2])}, "whole number"),
        ({"a": entry(0, 8, [True, 2])}, "whole number"),
        ({"a": entry(8, 0, [2])}, "does not have the -8 bytes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at byte"),  # overlap
        ({"a": entry(0, 4), "b": entry(8, 12)}, "b begins at byte"),  # hole
        ({"a": entry(4, 12)}, "a begins at byte"),
        ({"a": entry(0, 16)}, "cut short"),
        ({"a": entry(0, 2**62, [2**60])}, "cut short"),
        ({"__metadata__": {"format": "pt"}}, "no tensor"),
    ],
)
def test_a_bad_header_is_refused_in_words(tmp_path: Path, header: Any, words: str) -> None:
    url = header_file(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(UsageError, match=words):
        find_weights(url)


@pytest.mark.parametrize("size", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_an_odd_size_is_not_read(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="is no safetensors file"):
        find_weights(header_file(tmp_path / "bad.safetensors", {}, size=size))


@pytest.mark.parametrize("length", [0, 5, 8, 30])
def test_a_file_that_ends_early(tmp_path: Path, length: int) -> None:
    whole = tmp_path / "w.safetensors"
    save_file(TENSORS, whole)
    whole.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(UsageError, match="cut short"):
        find_weights(str(whole))


@given(st.binary(max_size=300), st.integers(0, 320))
@settings(max_examples=150)
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, text: bytes, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    with pytest.raises(DtrainError):
        find_weights(header_file(path, text, size=size))


def damage_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_index(lambda index: index.pop("weight_map")), "no field 'weight_map'"),
        (damage_index(lambda index: index["weight_map"].update(b="../two.safetensors")), "no name of a file there"),
        (damage_index(lambda index: index["weight_map"].update(b="/etc/passwd")), "no name of a file there"),
        (damage_index(lambda index: index["weight_map"].update(b=3)), "expected a string"),
        (damage_index(lambda index: index["weight_map"].update(b="one.safetensors")), "says that b is in one"),
        (damage_index(lambda index: index["weight_map"].update(c="two.safetensors")), "says that c is in two"),
        (damage_index(lambda index: index["weight_map"].clear()), "names no tensor"),
        (lambda root: (root / "two.safetensors").unlink(), "no such file"),
    ],
)
def test_a_bad_index_is_refused_in_words(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    root = sharded(tmp_path / "w")
    damage(root)
    with pytest.raises(UsageError, match=words):
        find_weights(str(root))


def test_the_same_name_in_two_files_needs_an_index(tmp_path: Path) -> None:
    root = folder(tmp_path / "w", x={"a": torch.zeros(1)}, y={"a": torch.ones(1)})
    with pytest.raises(UsageError, match="no index says which"):
        find_weights(str(root))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    assert find_weights(str(root)).tensors["a"].file == "y.safetensors"


# ---- which tensor fills which ----


def stored(*names: str, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, StoredTensor]:
    return {name: StoredTensor(file=name, dtype=dtype, shape=shape, begin=0, end=8) for name in names}


def wanted(*names: str, dtype: str = "F32") -> Wanted:
    return Wanted(names=names, dtype=dtype, shape=(2,))


def init(**settings: Any) -> InitConfig:
    return InitConfig(url="x", **settings)


def match_weights(wanted: list[Wanted], stored: dict[str, StoredTensor], config: InitConfig) -> Match:
    return match(wanted, stored, config, lambda names: {name: name for name in names})


def test_names_match_and_the_rest_is_told() -> None:
    found = match_weights([wanted("a"), wanted("head")], stored("a", "old"), init(fresh=("head*",)))
    assert list(found.sources) == ["a"]
    assert (found.fresh, found.replaced, found.unexpected) == (("head",), (), ("old",))


def test_a_tied_parameter_is_found_under_any_of_its_names() -> None:
    for name in ("wte", "lm_head"):
        assert match_weights([wanted("wte", "lm_head")], stored(name), init()).sources["wte"].file == name
    both = match_weights([wanted("wte", "lm_head")], stored("lm_head", "wte"), init())
    assert (both.sources["wte"].file, both.unexpected) == ("wte", ())


def test_what_starts_fresh_is_not_loaded_whatever_its_shape() -> None:
    files = {**stored("a"), **stored("head", shape=(5,))}
    found = match_weights([wanted("a"), wanted("head")], files, init(fresh=("head",)))
    assert (list(found.sources), found.replaced) == (["a"], ("head",))
    with pytest.raises(UsageError, match=r"head: \[5\] there, \[2\] here.*model\.init_from\.fresh"):
        match_weights([wanted("a"), wanted("head")], files, init())


def test_a_missing_tensor_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.weight: not there; the nearest is block\.0\.weight") as caught:
        match_weights([wanted("blocks.0.weight"), wanted("a")], stored("a", "block.0.weight"), init())
    assert "init_from.map" in str(caught.value)
    assert "init_from.fresh" in str(caught.value)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (["transformer.h.0.w", "transformer.wte", "head"], ["h.0.w", "wte", "head"]),
        (["h.0.w", "wte"], ["transformer.h.0.w", "transformer.wte", "lm_head"]),
    ],
)
def test_the_map_that_the_message_gives_works(here: list[str], there: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        match_weights([wanted(name) for name in here], stored(*there), init())
    renames = yaml.safe_load(str(caught.value).rpartition("Set map: ")[2])
    found = match_weights([wanted(name) for name in here], stored(*there), init(map=renames))
    assert set(found.sources) == set(here)


def test_a_prefix_that_explains_most_is_told_too() -> None:
    with pytest.raises(UsageError, match=r"2 of them are there with 'net\.' before them.*init_from\.fresh"):
        match_weights([wanted(name) for name in ("a", "b", "head")], stored("net.a", "net.b"), init())


def test_a_map_that_makes_two_names_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"x\.a and y\.a both become a"):
        match_weights([wanted("a")], stored("x.a", "y.a"), init(map={r"^.\.": ""}))
    with pytest.raises(UsageError, match="invalid group reference"):
        match_weights([wanted("a")], stored("x.a"), init(map={r"^.\.": r"\3"}))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'clasifier' matches no parameter. Did you mean classifier\?"):
        match_weights([wanted("classifier")], stored("classifier"), init(fresh=("clasifier",)))


@pytest.mark.parametrize(("there", "here", "fits"), [("BF16", "F32", True), ("I64", "I64", True), ("I8", "F32", False)])
def test_floats_convert_and_nothing_else(there: str, here: str, fits: bool) -> None:
    if fits:
        assert match_weights([wanted("a", dtype=here)], stored("a", dtype=there), init()).sources
    else:
        with pytest.raises(UsageError, match="do not convert"):
            match_weights([wanted("a", dtype=here)], stored("a", dtype=there), init())


# ---- at launch ----

CONFIG = """
model:
  _target_: torch.nn.Linear
  in_features: 4
  out_features: 1
  init_from:
    url: weights
    map: {'^net\\.': '\\1'}
loss: torch.nn.functional.mse_loss
data: {train: builtins.list, batch_size: 8}
optimizer: {_target_: torch.optim.SGD, lr: 1e-4}
train: {steps: 3}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "where", "words"),
    [
        (lambda root: None, "cfg.yaml:7: model.init_from.url", "no model.safetensors"),
        (lambda root: header_file(root / "model.safetensors", b"{ "), "cfg.yaml:7: model.init_from.url", "valid JSON"),
        (
            lambda root: save_file({"net.w": torch.ones(1)}, root / "model.safetensors"),
            "init_from.map",
            "invalid group",
        ),
    ],
)
def test_weights_that_cannot_be_loaded_are_found_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], object], where: str, words: str
) -> None:
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    (tmp_path / "weights").mkdir()
    make(tmp_path / "weights")
    assert main(["launch", "cfg.yaml"]) == 2
    said = capfd.readouterr().err
    assert where in said
    assert words in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.init_from.maps={}", "unknown key. Did you mean map?"),
        ("model.init_from.map={'(': 'abc'}", "'(' is no regular expression"),
        ("model.init_from.fresh=head", "Put it in square brackets"),
        ("model.frozen=head", "Put it in square brackets"),
        ("model.init_from=7", "expects"),
    ],
)
def test_wrong_keys_of_the_model_section(tmp_path: Path, override: str, words: str) -> None:
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "cfg.yaml", [override])
    assert words in str(caught.value)


def test_a_relative_folder_starts_at_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    for override, wanted_url in (
        ("model.init_from=w", str(tmp_path / "w")),
        ("model.init_from.url=s3://b/w", "s3://b/w"),
    ):
        init_from = load_config(tmp_path / "cfg.yaml", [override]).run.model.init_from
        assert init_from is not None
        assert init_from.url == wanted_url
