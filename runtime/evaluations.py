"""When the model is evaluated, where the numbers go, and whether they end the run early.

What is measured and how is evaluate.py's; the trainer calls run() and obeys `verdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime import earlystop
from dtrain.runtime.config import TrainConfig
from dtrain.runtime.metrics import MetricsLog, clean
from dtrain.runtime.report import Reporter

Evaluate = Callable[[nn.Module], dict[str, float] | None]


def is_due(config: TrainConfig, step: int) -> bool:
    """After `step`: every train.eval_every steps, and at the end."""
    return step >= config.steps or (config.eval_every is not None and step % config.eval_every == 0)


class Evaluations:
    """`log` and events are global rank 0's; the history and the verdict are the same on every rank."""

    def __init__(
        self,
        evaluate: Evaluate,
        config: TrainConfig,
        *,
        wanted: Mapping[str, str],
        attempt: int,
        report: Reporter,
        log: MetricsLog | None,
        history: Mapping[str, Any] | None,
    ) -> None:
        """`wanted`: config key -> the metric that it needs. `history`: what state() gave for the checkpoint that the
        run goes on from."""
        self._evaluate = evaluate
        self._config = config
        self._wanted = wanted
        self._attempt = attempt
        self._report = report
        self._log = log
        rule = config.early_stop
        self._history = None if rule is None else earlystop.begin(rule, history)

    def due(self, step: int) -> bool:
        return is_due(self._config, step)

    def run(self, step: int, model: nn.Module) -> dict[str, float] | None:
        """The metrics by name; None where a stop was requested on the way. Collective. Raises UsageError for a metric
        that the config names and the evaluation does not give."""
        found = self._evaluate(model)
        if found is None:
            return None
        for key, metric in self._wanted.items():
            if metric not in found:
                raise UsageError(f"{key}: there is no metric {metric}. The evaluation gives: {', '.join(found)}")
        if self._log is not None:
            self._log.write({"step": step, "attempt": self._attempt, **found})
            self._report.event("evaluated", step=step, metrics=clean(found))
        rule = self._config.early_stop
        if rule is not None and self._history is not None:
            self._history = earlystop.advance(self._history, step, found[rule.metric], rule.min_delta)
        return found

    @property
    def verdict(self) -> str:
        """Why the run is to end before its last step; empty where it goes on."""
        rule = self._config.early_stop
        return "" if rule is None or self._history is None else earlystop.verdict(self._history, rule)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON."""
        return {} if self._history is None else {"early_stop": self._history.to_json()}
