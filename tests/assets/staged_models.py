"""Small models that a pipeline has to think about: shared, frozen and unused parameters, statistics, other ways."""

from __future__ import annotations

from pathlib import Path

import parity
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dtrain.strategies.absent import is_absent


class Points(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return x, x.flip(0)


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(output, batch[1])


def errors(output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {"error": float((output - batch[1]).abs().mean())}


class Row(nn.Module):
    """Linear layers one after the other: what each variant below changes is one thing."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Mixed(Row):
    """A frozen beginning, a parameter that nothing uses, one that all stages use, batch statistics in two places, and a
    buffer that counts the forwards."""

    forwards: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(8))
        # A bias before batch statistics has no gradient but rounding, which Adam would make as large as any other.
        self.before = nn.BatchNorm1d(8, affine=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(4)
        )
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.forwards += 1
        x = self.before(self.first(x))
        for layer in self.layers:
            x = layer(x) * self.gain
        return x


class Skips(Row):
    """What goes in comes back after the second layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = kept = torch.tanh(self.first(x))
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if number == 1:
                x = x + kept
        return x


class Around(Row):
    """Beside its units: a layer that is called once, one that is called at both ends, one without parameters whose
    values are wanted to the end, one that counts its calls, and sums in place. The units, too, write to what they are
    called with. At the end it looks at what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(8, 8)) for _ in range(4))
        self.twice, self.weights, self.second = nn.Linear(8, 8), nn.Softmax(dim=-1), Counting(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        x = self.second(self.twice(self.first(x)))
        for layer in self.layers:
            x = layer(x)
            x += 1
        assert isinstance(self.first, nn.Linear)
        output: Tensor = self.twice(x) * weights
        return output


class Again(Row):
    """Its first unit runs a second time, after the second one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number in (0, 1, 0, 2, 3):
            x = torch.tanh(self.layers[number](x))
        return x


class Fork(Row):
    """Two units get the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.layers[0](x) + self.layers[1](x)
        output: Tensor = self.layers[3](self.layers[2](x))
        return output


class Direct(Row):
    """The first unit is called with the batch."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.first(x)
        return output


class Pair(nn.Linear):
    def forward(self, x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), batch * 2


class Pairs(Row):
    """What the first unit makes of the batch comes back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out, kept = self.layers[0](self.first(x), x)
        for layer in self.layers[1:]:
            out, _ = layer(out, x)
        output: Tensor = out + kept
        return output


class Counted(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(x), len(x)


class Counts(Row):
    """Its units give numbers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counted(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


class Drops(Row):
    """Random numbers before the units, in them, and at the end those from the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        kept = nn.functional.dropout(x)
        x = self.first(x)
        for layer in self.layers:
            x = nn.functional.dropout(layer(x))
        return x * kept


class Named(Row):
    """Calls its units by keyword, asks them for their sizes, and gives what they return another shape in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            x = layer(input=x.reshape(-1, layer.in_features))
            rows, width = x.shape
            x.unsqueeze_(0)
        return x.view(rows, width)


class Counting(nn.Linear):
    """Not torch's own: what it does besides nobody knows."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Writes(Row):
    """Puts its values into a tensor that it has made."""

    def forward(self, x: Tensor) -> Tensor:
        room = torch.zeros_like(x)
        room[:, :4] = self.first(x)[:, :4]
        for layer in self.layers:
            room = layer(room)
        return room


class _NotedDropout(nn.Dropout):
    """Draws one number more, and writes it down: a file a process."""

    def __init__(self, p: float, folder: str) -> None:
        super().__init__(p)
        self.folder = folder

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not is_absent(x):
            with (Path(self.folder) / f"{id(self)}-{torch.distributed.get_rank()}").open("a") as file:
                file.write(f"{float(torch.rand(()))}\n")
        return super().forward(x)


def noting(folder: str, dropout: float, **settings: int) -> nn.Module:
    """The parity model, which leaves in `folder` what was drawn in its dropouts."""
    model = parity.Transformer(**settings)
    for block in model.blocks:
        assert isinstance(block, parity.Block)
        block.dropout = _NotedDropout(dropout, folder)
    return model


_ELSEWHERE: list[Tensor] = []


class Hides(Row):
    """Uses a parameter that is not reached through the model."""

    def __init__(self) -> None:
        super().__init__()
        _ELSEWHERE[:] = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ _ELSEWHERE[0]


class Looks(Row):
    """Decides by its values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.mean() > 0:
            x = -x
        for layer in self.layers:
            x = layer(x)
        return x


class Lists(Looks):
    """Makes Python numbers of its values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(super(Looks, self).forward(x).tolist())
