"""A Hugging Face model as it is, and text for it: Python's own standard library, byte by byte. Needs transformers.

Nothing of dtrain: huggingface.yaml trains a model from its config, finetune.yaml one from a folder.
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM


def from_config(kind: str, **settings: Any) -> nn.Module:
    """A model with initial weights: `kind` is what transformers calls its type, like gpt2 or llama."""
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return model


def from_folder(folder: str) -> nn.Module:
    """The model that the folder's config.json describes; `init_from` brings the weights, each rank its own part."""
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


class SourceText(Dataset[dict[str, Tensor]]):
    """Windows of `context` bytes of the files that match, tokens 0 to 255; the last 5 % are the eval split."""

    def __init__(self, split: str = "train", context: int = 64, files: str = "*.py"):
        found = sorted(Path(sysconfig.get_path("stdlib")).glob(files))
        text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in found)), dtype=torch.uint8)
        border = len(text) * 95 // 100
        self.text, self.context = text[:border] if split == "train" else text[border:], context

    def __len__(self) -> int:
        return len(self.text) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.text[index * self.context :][: self.context].long()
        return {"input_ids": window, "labels": window}  # the model shifts them itself, and computes its loss


def sample(model: nn.Module, prompt: str = "def ", length: int = 200, context: int = 64) -> str:
    """What the model writes after `prompt`. Every rank gets here with the same seed, as sharded models need."""
    device, text = next(model.parameters()).device, torch.tensor([list(prompt.encode())])  # (1, seq)
    for _ in range(length):
        logits = model(input_ids=text[:, -context:].to(device)).logits[0, -1].float().cpu()
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")
