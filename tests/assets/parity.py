"""The parity model: a tied transformer of more than 1 MB, and a data set that keeps a record of what was seen."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

# How far the loss of any of 50 steps may be from one process's, relative. fp32: sums in another order. bf16 and fp16
# round every product of the forward, by up to u = 2**-8 and 2**-11; a mean over many logits rounds less: u / 16.
# Measured over ddp and fsdp on 2 and 3 ranks: 8e-8, 7e-5, 1.2e-5.
TOLERANCE = {"fp32": 1e-6, "bf16": 2**-8 / 16, "fp16": 2**-11 / 16}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, seq, width)))
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return y


class Transformer(nn.Module):
    """Tied embedding and head; 2.2 MB of parameters with the defaults."""

    calls: Tensor

    def __init__(
        self, vocab: int = 1024, width: int = 128, layers: int = 2, heads: int = 4, seq: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(seq, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq) -> (batch, seq, vocab)
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Tokens(Dataset[Any]):
    """Sequences with a pattern to learn. With `seen`, appends each index that is read to `<seen>.<pid>`. `noise` draws
    from torch's generator: an augmentation. `lengths` varies how many targets count, for losses over tokens."""

    def __init__(
        self,
        samples: int = 300,
        seq: int = 16,
        vocab: int = 1024,
        seen: str | None = None,
        noise: float = 0.0,
        lengths: bool = False,
        delay_s: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        start = torch.randint(vocab, (samples, 1), generator=generator)
        stride = torch.randint(1, 4, (samples, 1), generator=generator)
        self.tokens = (start + stride * torch.arange(seq + 1)) % vocab
        self.vocab, self.seen, self.noise, self.lengths, self.delay_s = vocab, seen, noise, lengths, delay_s

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        if self.delay_s:
            import time

            time.sleep(self.delay_s)
        if self.seen:
            with open(f"{self.seen}.{os.getpid()}", "a") as file:
                file.write(f"{index}\n")
        row = self.tokens[index]
        inputs, targets = row[:-1], row[1:].clone()
        if self.noise:
            replaced = torch.rand(inputs.shape) < self.noise
            inputs = torch.where(replaced, torch.randint(self.vocab, inputs.shape), inputs)
        if self.lengths:
            targets[3 + index % 13 :] = -100
        return inputs, targets


def mean_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[-1].flatten())


def steep_loss(output: Tensor, batch: Any) -> Tensor:
    """Its gradients overflow in fp16 at a loss scale of 2**16, and for a while below."""
    return mean_loss(output, batch) * 2.0**16


def token_loss(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """(sum, count) over the targets that are not ignored."""
    targets = batch[-1].flatten()
    total = F.cross_entropy(output.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()


def count_targets(batch: Any) -> int:
    return int((batch[-1] != -100).sum())
