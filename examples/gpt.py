"""A byte-level GPT and the text it learns: the source of Python's own standard library.

Plain PyTorch, nothing of dtrain: gpt.yaml names what is in here. `sample` shows at the end what was learned.
"""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, seq, width / heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128, vocab: int = 256):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)  # small, because the same weights are the output layer
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq) -> logits (batch, seq, vocab)
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


class SourceText(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context` bytes, each with the bytes one further on; the last 5 % of the text is the eval split."""

    def __init__(self, split: str = "train", context: int = 128):
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        border = len(text) * 95 // 100
        self.text, self.context = text[:border] if split == "train" else text[border:], context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * self.context :][: self.context + 1].long()
        return window[:-1], window[1:]


def sample(model: nn.Module, prompt: str = "def ", length: int = 300, context: int = 128) -> str:
    """What the model writes after `prompt`. Every rank gets here with the same seed, as sharded models need."""
    device, text = next(model.parameters()).device, torch.tensor([list(prompt.encode())])  # (1, seq)
    for _ in range(length):
        end = min(text.shape[1], context)  # a whole window suits every layout; what lies behind the end is not seen
        logits = model(F.pad(text[:, -end:], (0, context - end)).to(device))[0, end - 1].float().cpu()
        text = torch.cat([text, torch.multinomial(F.softmax(logits, dim=-1), 1)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")
