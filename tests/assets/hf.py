"""Hugging Face models from configs or folders, as a user's own module would name them, and data that fits them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCAB, SEQ = 512, 16
TEXT = {"vocab_size": VOCAB}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> (auto class, model type, settings)
    "gpt2": (
        "AutoModelForCausalLM",
        "gpt2",
        {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": SEQ}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "llama": (
        "AutoModelForCausalLM",
        "llama",
        {**TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "max_position_embeddings": SEQ},
    ),
    "bert": (
        "AutoModelForMaskedLM",
        "bert",
        {**TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": SEQ, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "vit": (
        "AutoModelForImageClassification",
        "vit",
        {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_labels": 5},
    ),
}


def from_config(name: str, **changes: Any) -> nn.Module:
    auto, kind, settings = CONFIGS[name]
    model: nn.Module = getattr(transformers, auto).from_config(
        transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    )
    return model


def from_folder(auto: str, folder: str) -> nn.Module:
    """The architecture that a folder's config.json describes, with initial weights of its own."""
    model: nn.Module = getattr(transformers, auto).from_config(transformers.AutoConfig.from_pretrained(folder))
    return model


class Samples(Dataset[dict[str, Tensor]]):
    """Text with a label at every place (causal), at some (masked), or images with one label."""

    def __init__(self, name: str, size: int = 64) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        if self.name == "vit":
            return {
                "pixel_values": torch.randn(3, 16, 16, generator=generator) + index % 5,
                "labels": torch.tensor(index % 5),
            }
        ids = torch.randint(VOCAB, (SEQ,), generator=generator) // (1 + index % 3)
        if self.name != "bert":
            return {"input_ids": ids, "labels": ids}
        chosen = torch.rand(SEQ, generator=generator) < 0.1 + 0.1 * (index % 4)
        chosen[0] = True
        return {"input_ids": torch.where(chosen, 3, ids), "labels": torch.where(chosen, ids, -100)}


for _name in CONFIGS:  # their modules are imported when the first model is made: once, before the ranks are forked
    from_config(_name)
