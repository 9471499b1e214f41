"""checkpoint.save and checkpoint.load in a script's own hands: nested states, other layouts, attempts, mistakes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.cluster.errors import AlreadyExists, CheckpointError, CorruptCheckpoint, FencedError, UsageError
from dtrain.cluster.storage import open_storage
from dtrain.launcher import cli
from dtrain.runtime import checkpoint
from dtrain.runtime.checkpoint import functional
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints
from dtrain.runtime.checkpoint.tree import Filling, flatten

SCRIPT = Path(__file__).parent / "assets" / "scripts" / "any_layout.py"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embed(tokens)))
        return out


def trained(seed: int, steps: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    groups: list[dict[str, Any]] = [{"params": model.norm.parameters(), "lr": 0.1}, {"params": model.head.parameters()}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.arange(11)).square().sum())
        optimizer.step()
    return model, optimizer


def process(url: object) -> None:
    """As in a new process: what this one has opened there is forgotten."""
    functional._stores.pop(os.path.abspath(str(url)), None)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# ---- the tree, without a store ----

AWKWARD: dict[str, Any] = {
    "numbers": [1, 2.5, True, None, "text", -0.0],
    "limits": {"best": math.inf, "worst": -math.inf, "none": math.nan},
    "tuple": (1, (2, [3])),
    "by_number": {0: "a", 7: {"$": "a dollar"}},
    "$": "another",
    "empty": [{}, [], ()],
    "tensors": [torch.arange(6).reshape(2, 3).T, torch.tensor(1.5, dtype=torch.float64), torch.zeros(0, 3)],
    "types": {str(t): torch.ones(3, dtype=t) for t in (torch.bool, torch.uint8, torch.bfloat16, torch.float16)},
}


def test_any_nesting_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), 3, AWKWARD)
    found: dict[str, Any] = {}
    assert checkpoint.load(str(tmp_path), found) == 3
    assert equal(found, AWKWARD)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": [object()]}}, r"a\.b\.0: a object can't be saved"),
        ({"a": {1, 2}}, "a: a set can't be saved"),
        ({"a": {(1, 2): 3}}, r"a: the key \(1, 2\) is neither text nor a whole number"),
        ({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, r"a\.b: two tensors have this name"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "a: tensors of torch.complex64 can't be checkpointed"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_written(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoint.save(str(tmp_path / "ck"), 1, state)
    assert live_checkpoints(open_storage(str(tmp_path / "ck"))) == []


def test_tied_tensors_are_stored_once_and_may_be_apart_later() -> None:
    weight = torch.ones(2)
    tree, tensors = flatten({"a": weight, "b": weight, "view": weight[:1]})
    assert list(tensors) == ["a", "view"]
    apart = {"a": torch.zeros(2), "b": torch.zeros(2), "view": torch.zeros(1)}
    filling = Filling({"a": ("F32", (2,)), "view": ("F32", (1,))})
    filling.value((), tree, apart, "some")
    filling.requests["a"].fill_(7)
    filling.finish()
    assert apart["b"].tolist() == [7, 7]


# ---- one process ----


def test_modules_optimizers_schedules_and_values(tmp_path: Path) -> None:
    model, optimizer = trained(0, 3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0):
        schedule.step(loss)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "epoch": 4, "rng": torch.get_rng_state()}
    checkpoint.save(str(tmp_path), 3, state)

    model2, optimizer2 = trained(1, 0)
    schedule2 = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer2, patience=0)
    epoch: dict[str, Any] = {"epoch": 0, "rng": torch.zeros_like(torch.get_rng_state())}
    before = model2.embed.weight.data_ptr()
    fresh = {"model": model2, "optimizer": optimizer2, "schedule": schedule2, **epoch}
    assert checkpoint.load(str(tmp_path), fresh) == 3
    assert equal(dict(model2.state_dict()), dict(model.state_dict()))
    assert model2.head.weight is model2.embed.weight
    assert model2.embed.weight.data_ptr() == before
    assert equal(optimizer2.state_dict(), optimizer.state_dict())
    assert equal(schedule2.state_dict(), schedule.state_dict())
    assert fresh["epoch"] == 4
    assert equal(fresh["rng"], state["rng"])


def test_a_wrapped_module_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    model, _ = trained(0, 0)
    checkpoint.save(str(tmp_path), 1, {"model": torch.compile(model, backend="eager")})
    plain, _ = trained(1, 0)
    assert checkpoint.load_model(str(tmp_path), plain).step == 1  # as from a trainer's checkpoint
    assert equal(dict(plain.state_dict()), dict(model.state_dict()))


def test_a_part_may_be_loaded_and_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model, optimizer = trained(0, 1)
    checkpoint.save(str(tmp_path), 1, {"model": model, "optimizer": optimizer, "epoch": 1})
    part, _ = trained(1, 0)
    assert checkpoint.load(str(tmp_path), {"model": part}) == 1
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(str(tmp_path), {"model": nn.Sequential(nn.Linear(5, 11)), "ema": torch.zeros(1)})
    assert "model.0.weight: not in the checkpoint" in str(caught.value)
    assert "model.embed.weight: in the checkpoint, not here" in str(caught.value)
    assert "ema: not in the checkpoint" in str(caught.value)
    bigger = Tied()
    bigger.norm = nn.BatchNorm1d(6)
    untouched = bigger.embed.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias: F32 \[5\] in the checkpoint, F32 \[6\] here"):
        checkpoint.load(str(tmp_path), {"model": bigger})
    assert torch.equal(bigger.embed.weight, untouched)


def test_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.load(str(tmp_path / "new"), {"a": 1}) is None
    checkpoint.save(str(tmp_path / "new"), 5, {"a": 1})
    with pytest.raises(CheckpointError, match=r"no live checkpoint of step 4 .* Live steps: 5\."):
        checkpoint.load(str(tmp_path / "new"), {"a": 1}, step=4)
    for step in (0, -1, True, 1.0):
        with pytest.raises(ValueError, match="expects a whole number from 1 on"):
            checkpoint.save(str(tmp_path), step, {})  # type: ignore[arg-type]


def test_the_other_commands_know_these_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        checkpoint.save(str(tmp_path), step, {"a": torch.arange(step)}, keep=2)
    assert cli.main(["ckpt", "ls", "--json", str(tmp_path)]) == 0
    assert '"step": 2' in capsys.readouterr().out
    assert [info.step for info in live_checkpoints(open_storage(str(tmp_path)))] == [2, 3]
    assert cli.main(["ckpt", "verify", str(tmp_path)]) == 0
    data = tmp_path / "step-00000003-a0001" / "rank-00000.safetensors"
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    assert cli.main(["ckpt", "verify", str(tmp_path)]) == 1
    with pytest.raises(CorruptCheckpoint):
        checkpoint.load(str(tmp_path), {"a": torch.zeros(3, dtype=torch.int64)})
    assert checkpoint.load(str(tmp_path), {"a": torch.zeros(2, dtype=torch.int64)}, step=2) == 2


def test_in_the_background_and_the_state_may_change_at_once(tmp_path: Path) -> None:
    weight = torch.ones(1000)
    checkpoint.save(str(tmp_path), 1, {"w": weight, "n": [1]}, wait=False)
    weight.zero_()
    checkpoint.wait()
    found: dict[str, Any] = {}
    checkpoint.load(str(tmp_path), found)
    assert (found["w"].sum().item(), found["n"]) == (1000, [1])


# ---- attempts ----


def test_each_process_is_an_attempt_from_what_it_loaded(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (1, 2, 3):
        checkpoint.save(url, step, {"a": step})
    process(url)
    state = {"a": 0}
    assert checkpoint.load(url, state, step=2) == 2
    checkpoint.save(url, 3, state)  # again, by attempt 2
    steps = [(info.step, info.attempt, info.live) for info in live_checkpoints(open_storage(url))]
    assert steps == [(1, 1, True), (2, 1, True), (3, 1, False), (3, 2, True)]
    process(url)
    assert checkpoint.load(url, state) == 3
    assert state == {"a": 2}


def test_one_that_was_replaced_commits_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    checkpoint.save(url, 1, {"a": 1})
    old = functional._stores[url]
    process(url)
    assert checkpoint.load(url, {"a": 0}) == 1
    checkpoint.save(url, 2, {"a": 2})
    functional._stores[url] = old  # it slept meanwhile
    with pytest.raises((FencedError, AlreadyExists)):
        checkpoint.save(url, 2, {"a": 9})
    process(url)
    state = {"a": 0}
    assert checkpoint.load(url, state) == 2
    assert state == {"a": 2}


def test_a_trainers_checkpoint_gives_its_model(tmp_path: Path) -> None:
    from dtrain.runtime.checkpoint.board import LocalBoard
    from dtrain.runtime.checkpoint.checkpointer import Checkpointer
    from dtrain.strategies.state import canonical_state

    model, optimizer = trained(0, 2)
    saver = Checkpointer(open_storage(str(tmp_path)), attempt=1, rank=0, world_size=1, strategy={"name": "ddp"},
                         board=LocalBoard(), on_commit=lambda done: None, keep=None)  # fmt: skip
    claim_attempt(open_storage(str(tmp_path)), host="h", job_id="j")
    specs, local, values = canonical_state(model, optimizer, 1)
    saver.save(8, specs, local, {"step": 8, "position": 0, "optimizer": values})
    saver.wait()
    found, unused = trained(1, 0)
    assert checkpoint.load(str(tmp_path), {"model": found}) == 8
    assert equal(dict(found.state_dict()), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match="optimizer: step 8 was saved by dtrain's trainer"):
        checkpoint.load(str(tmp_path), {"model": found, "optimizer": unused})


# ---- several ranks ----


def test_ranks_that_have_not_joined_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, .* Call torch\.distributed\.init_process_group\(\) first"):
        checkpoint.save(str(tmp_path), 1, {"a": 1})


def run_ranks(num: int, *args: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--log-dir", "logs", "--nproc-per-node", str(num)]
    found = subprocess.run(
        [sys.executable, *(launcher if num > 1 else []), SCRIPT, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=800,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_any_layout_continues_any_other(tmp_path: Path) -> None:
    """FSDP2 on 2 ranks, 3 ranks, one plain process, DDP on 2: each goes on from the one before, and all of it is one
    training. Without dtrain around it."""
    url = str(tmp_path / "ck")
    parts = [run_ranks(num, url, layout, "3") for num, layout in ((2, "fsdp"), (3, "fsdp"), (1, "plain"), (2, "ddp"))]
    went_on = [float(line) for part in parts for line in part.split()]
    straight = [float(line) for line in run_ranks(1, str(tmp_path / "other"), "plain", "12").split()]
    assert len(went_on) == len(straight) == 12
    assert went_on == pytest.approx(straight, rel=1e-5)


@pytest.mark.e2e
def test_what_differs_between_ranks_is_refused_on_all_of_them(tmp_path: Path) -> None:
    said = run_ranks(2, str(tmp_path / "ck"), "differing", "0")
    assert said.count("checkpoint.save: local, rng not equal on all ranks") == 2
    assert live_checkpoints(open_storage(str(tmp_path / "ck"))) == []
