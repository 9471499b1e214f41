"""One MLflow run for one dtrain run, whatever number of attempts and launches it takes.

Where and in which experiment follow MLflow's own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, credentials);
which run it is stands in <run>/mlflow.json. MLflow can't take back a point, so a step that it has is not sent again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import mlflow
import yaml
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.runtime.tracking.process import Record, flat_numbers

MAX_METRICS = 1000  # MLflow's limits for one request, https://mlflow.org/docs/latest/rest-api.html#log-batch
MAX_PARAMS = 100
MAX_PARAM_CHARS = 6000


class MlflowTracker:
    def __init__(self, run: RunDir, start_step: int) -> None:
        self._newest: dict[str, int] = {}  # by metric, what MLflow has
        record = run.path / "mlflow.json"
        known = read_json(record)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (known["tracking_uri"] if known else mlflow.get_tracking_uri())
        self._client = MlflowClient(tracking_uri=_absolute(uri))
        if known is None:
            self._run_id = self._create(run)
            shown = {"run_id": self._run_id, "tracking_uri": _without_user(_absolute(uri))}
            write_atomic(record, json.dumps(shown))
        else:
            self._run_id = str(known["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")

    def log(self, records: Sequence[Record]) -> None:
        metrics = [metric for record in records for metric in self._metrics(record)]
        for start in range(0, len(metrics), MAX_METRICS):
            part = metrics[start : start + MAX_METRICS]
            try:
                self._client.log_batch(self._run_id, metrics=part)
            except Exception:
                self._newest.clear()  # they may have arrived all the same: ask again
                raise
            for metric in part:
                self._newest[metric.key] = max(self._newest[metric.key], metric.step)

    def close(self) -> None:
        self._client.update_run(self._run_id, status="FINISHED")

    def _metrics(self, record: Record) -> Iterator[Metric]:
        step, now = int(record["step"]), int(time.time() * 1000)
        for key, value in flat_numbers(record).items():
            if key not in self._newest:
                history = self._client.get_metric_history(self._run_id, key)
                self._newest[key] = max((metric.step for metric in history), default=0)
            if step > self._newest[key]:
                yield Metric(key, value, now, step)

    def _create(self, run: RunDir) -> str:
        config = yaml.safe_load(run.config.read_text())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = self._client.create_run(
            experiment_id, run_name=config["name"], tags={"dtrain.run_dir": str(run.path)}
        )
        run_id = str(created.info.run_id)
        parameters = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in _flat(config)]
        try:
            for start in range(0, len(parameters), MAX_PARAMS):
                self._client.log_batch(run_id, params=parameters[start : start + MAX_PARAMS])
        except MlflowException:
            self._client.delete_run(run_id)  # the next try makes another
            raise
        return run_id


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from _flat(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _absolute(uri: str) -> str:
    """A store in a local file is meant from the working directory, whatever it is at the next launch."""
    prefix = "sqlite:///"
    path = uri.removeprefix(prefix)
    return prefix + os.path.abspath(path) if uri.startswith(prefix) and not path.startswith("/") else uri


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
