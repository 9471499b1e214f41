"""How a batch goes through the model, and what the loss is a mean over: the defaults and what replaces them."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime.config import RunConfig, read_run_config
from dtrain.runtime.labels import count_labels, takes_num_items
from dtrain.runtime.task import Task, forward, forward_with_num_items, make_task

CPU = torch.device("cpu")
LABELS = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, 9]])


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:  # (batch,) -> (batch,)
        return x * self.weight

    def score(self, x: Tensor) -> Tensor:
        return x * self.weight


class Wide(Doubling):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return x * self.weight * scale


def by_keyword(model: nn.Module, batch: Any, power: int = 1) -> Any:
    return model(batch[0], scale=batch[1] ** power)


def closure(model: nn.Module, batch: Any) -> Any:
    return model(batch).mean()


def closure_of_sums(model: nn.Module, batch: Any) -> Any:
    return model(batch).sum(), 2 * len(batch)


def past_the_model(model: Any, batch: Any) -> Any:
    return model.score(batch)


def raises_past_the_model(model: Any, batch: Any) -> Any:
    raise RuntimeError("mixed torch.Tensor and DTensor")


def closure_of_text(model: nn.Module, batch: Any) -> str:
    model(batch)
    return "0.5"


def task(tmp_path: Any, model: nn.Module, **more: Any) -> Task:
    return make_task(config(tmp_path, **more), model, CPU)


def config(tmp_path: Any, **more: Any) -> RunConfig:
    lines = {"name": "x", "model": "m.f", "data": {"train": "m.f", "batch_size": 1}, "optimizer": "m.f"}
    lines |= {"train": {"steps": 1}, **{key: value for key, value in more.items() if key != "forward"}}
    if "forward" in more:
        lines["data"] = {"train": "m.f", "batch_size": 1, "forward": more["forward"]}
    import json

    (tmp_path / "config.yaml").write_text(json.dumps(lines))
    found: RunConfig = read_run_config(tmp_path / "config.yaml")[0]
    return found


def test_data_forward_replaces_the_call(tmp_path: Any) -> None:
    target = {"_target_": f"{__name__}.by_keyword", "power": 2}
    through = task(tmp_path, Wide(), forward=target).forward
    batch = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    for _ in range(2):  # the first call is watched
        assert through(Wide(), batch, 2.0).tolist() == [18.0, 4.0]


@pytest.mark.parametrize("key", ["forward", "loss_closure"])
def test_what_does_not_call_the_model_is_refused(tmp_path: Any, key: str) -> None:
    model = Doubling()
    found = task(tmp_path, model, **{key: f"{__name__}.past_the_model"})
    with pytest.raises(UsageError, match=r"(data.forward|loss_closure): the model itself was not called"):
        found.forward(model, torch.ones(2), 2.0)
    broken = task(tmp_path, model, **{key: f"{__name__}.raises_past_the_model"})
    with pytest.raises(RuntimeError) as raised:
        broken.forward(model, torch.ones(2), 2.0)
    assert "the model itself was not called" in raised.value.__notes__[0]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("function", "total", "count"), [("closure", 12.0, 3.0), ("closure_of_sums", 12.0, 6.0)])
def test_loss_closure_gives_a_mean_or_a_sum_and_count(tmp_path: Any, function: str, total: float, count: float) -> None:
    model = Doubling()
    found = task(tmp_path, model, loss_closure=f"{__name__}.{function}")
    batch = torch.tensor([1.0, 2.0, 3.0])
    value, counted = found.loss(found.forward(model, batch, found.count(batch)), batch, found.count(batch))
    assert (value.item(), counted) == (total, count)
    assert value.requires_grad


def test_loss_closure_that_returns_something_else(tmp_path: Any) -> None:
    found = task(tmp_path, Doubling(), loss_closure=f"{__name__}.closure_of_text")
    with pytest.raises(UsageError, match="loss_closure: returned str"):
        found.loss(found.forward(Doubling(), torch.ones(1), 1.0), None, 1.0)


# ---- labels ----


def hugging_face(name: str) -> Any:
    """A tiny model of transformers, from its config."""
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'dtrain[hf]'")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    match name:
        case "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
                )
            )
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
        case "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=16, pad_token_id=0, **sizes))
        case "bert classifier":
            return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=16, **sizes))
        case "t5":
            sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
            return transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=16, decoder_start_token_id=0, **sizes)
            )
        case _:
            raise ValueError(name)


MODELS = ["gpt2", "llama", "bert", "bert classifier", "t5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_over_two_uneven_halves_is_that_of_one_forward(tmp_path: Any, name: str) -> None:
    """So the default count is what the model's own loss is a mean over, and the mean is exact however it is cut."""
    model = hugging_face(name).eval()
    found = task(tmp_path, model)
    ids = torch.randint(1, 16, (3, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0, 1]) if "classifier" in name else ids.clone()
    if labels.ndim == 2:
        labels[0, 2:] = labels[1, 0] = -100
    whole = {"input_ids": ids, "labels": labels}
    sums, counts = 0.0, 0.0
    for half in (slice(0, 1), slice(1, 3)):
        batch = {key: value[half] for key, value in whole.items()}
        count = found.count(batch)
        total, counted = found.loss(found.forward(model, batch, count), batch, count)
        sums, counts = sums + total.item(), counts + counted
    assert sums / counts == pytest.approx(model(**whole).loss.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_num_items_are_passed_where_the_forward_takes_them(name: str) -> None:
    assert takes_num_items(hugging_face(name))


def test_num_items_are_not_passed_to_other_models() -> None:
    class Keywords(nn.Module):
        def forward(self, labels: Tensor, **more: Any) -> Tensor:
            assert not more
            return labels

    class Asks(nn.Module):
        def forward(self, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Any:
            return {"loss": None if num_items_in_batch is None else labels.sum() / num_items_in_batch}

    assert not takes_num_items(Keywords())
    assert takes_num_items(Asks())
    found = forward_with_num_items(Asks(), UserDict({"labels": LABELS}), 5.0)
    assert found["loss"] == LABELS.sum() / 5
    assert forward_with_num_items(Asks(), {"labels": LABELS}, 0.0)["loss"].isfinite()  # a rank that only joins in
    assert forward(Asks(), {"labels": LABELS}, 5.0)["loss"] is None


def test_count_without_hugging_face() -> None:
    count = count_labels(Doubling())
    assert count({"x": torch.ones(2, 4), "labels": LABELS}) == 5.0
    assert count({"x": torch.ones(2, 4), "labels": torch.ones(2, 4)}) == 2.0  # regression: samples
    assert count((torch.ones(2, 4), LABELS)) == 2.0
    assert count({"labels": "none", "x": torch.ones(3)}) == 3.0


def test_a_loss_of_ones_own_is_a_mean_over_samples(tmp_path: Any) -> None:
    own = task(tmp_path, Doubling(), loss=f"{__name__}.closure")
    assert own.count({"x": torch.ones(2, 4), "labels": LABELS}) == 2.0


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": torch.ones(2), "label": torch.ones(2)}, "passed as model(**batch), here with x, label."),
        ((torch.ones(2), torch.ones(2), torch.ones(2)), "passed as model(*batch[:-1]), here 3 entries"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(batch: Any, words: str) -> None:
    with pytest.raises(TypeError) as raised:
        forward(Doubling(), batch, 2.0)
    assert words in raised.value.__notes__[0]
    assert "data.forward" in raised.value.__notes__[0]


def test_other_type_errors_are_left_alone() -> None:
    with pytest.raises(TypeError) as raised:
        forward(Doubling(), "text", 2.0)
    assert not hasattr(raised.value, "__notes__")
