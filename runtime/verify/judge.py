"""From the records of finished runs to a verdict. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.runtime.config import TrainConfig
from dtrain.runtime.verify.compare import Runs, compare
from dtrain.runtime.verify.records import FACTS, GROUPED, PLAIN, RECORDS, read_run
from dtrain.runtime.verify.verdict import Verdict


def judge(strategy: Path, one: Path, number: int, train: TrainConfig) -> Verdict:
    """`strategy` and `one`: the run directories of a strategy and of one process, for which it was the `number`-th."""
    facts = json.loads((one / PLAIN / FACTS).read_text())
    runs = Runs(
        plain=read_run(one / PLAIN),
        grouped=read_run(one / GROUPED.format(number)),
        ranks=read_run(strategy / RECORDS),
        precision=train.precision,
        clip=train.clip_grad_norm,
        batch_statistics=facts["batch_statistics"],
        trainable=frozenset(facts["trainable"]),
    )
    return compare(runs, tuple(_notes(facts, runs)))


def _notes(facts: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    if facts["dropout"]:
        yield f"dropout was set to 0 in {facts['dropout']} places: ranks draw other random numbers than one process"
