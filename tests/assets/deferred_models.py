"""Models that begin in many ways, to be built on paper; and what a rank needs to build a large one."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dtrain.runtime.build import build
from dtrain.runtime.config import read_run_config
from dtrain.runtime.ranks import Ranks

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def gpt2() -> Any:
    hf = _transformers()
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500))


def llama() -> Any:
    hf = _transformers()
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=500, **_SIZES))


def bert() -> Any:
    hf = _transformers()
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=500, **_SIZES))


def vit() -> Any:
    hf = _transformers()
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **_SIZES))


def _transformers() -> Any:
    """Seconds to import: not for those that only look for tests here."""
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'dtrain[hf]'")


class Odd(nn.Module):
    """Values that depend on others, that are read while building, overwritten, moved, drawn from another generator."""

    def __init__(self) -> None:
        super().__init__()
        self.orthogonal = nn.Linear(64, 64)
        nn.init.orthogonal_(self.orthogonal.weight)
        weight = self.orthogonal.weight
        self.copied = nn.Linear(64, 64)
        self.copied.weight.data = weight.data.clone() * 0.5
        with torch.no_grad():
            self.copied.weight[3].zero_()
            self.copied.weight[:, 2] = 7
            weight /= weight.norm()
        before = weight.detach().clone()
        nn.init.normal_(weight)
        self.before = nn.Parameter(before + 1)  # of what has been written over since
        self.moved = nn.Parameter(torch.randn(64, 64))
        with torch.no_grad():
            self.moved[:32].copy_(self.moved[32:])
        self.table = nn.Embedding(100, 64, padding_idx=5)
        nn.init.trunc_normal_(self.table.weight, std=0.1, a=-0.15, b=0.15)  # draws until all fit
        self.gain = nn.Parameter(weight.abs().mean())
        own = torch.Generator().manual_seed(3)
        self.other_random = nn.Parameter(torch.randn(64, 64, generator=own))
        self.transposed = nn.Parameter(torch.rand(64, 64).t())
        self.filled = nn.Parameter(torch.empty(64, 64))
        self.filled.data.normal_(generator=own)
        self.conv = nn.Conv2d(3, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.narrow = nn.Linear(64, 64).to(torch.bfloat16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.lstm = nn.LSTM(32, 32)
        self.attention = nn.MultiheadAttention(64, 2)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 2000)]
        self.register_buffer("angles", torch.sin(torch.arange(64 * 64).float()).view(64, 64))


class Heavy(nn.Module):
    """128 MiB in 16 layers, initialized once more at the end."""

    def __init__(self, width: int = 1448, layers: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)
        self.apply(self.begin)

    def begin(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(x)
        return found


class Vectors(Dataset[tuple[Tensor, Tensor]]):
    """What goes into Heavy."""

    def __init__(self, width: int = 1448) -> None:
        self.width = width

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.width), torch.zeros(1)


def peak_bytes(ranks: Ranks, small: str, folder: str) -> int:
    """How much more memory this rank took at most while it built the model, after it had built a small one."""
    config, strategy = read_run_config(Path(small) / "config.yaml")
    build(config, strategy, ranks, nodes=1)
    config, strategy = read_run_config(Path(folder) / "config.yaml")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrapped, _ = build(config, strategy, ranks, nodes=1)
    assert sum(p.numel() for p in wrapped.module.parameters()) > 30e6, "as anybody counts: the whole model's"
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
