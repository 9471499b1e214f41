"""The thread of an agent that sends what the node writes: what a worker waits for before a checkpoint, and the end.
And the claim of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.cluster import mirror
from dtrain.cluster.errors import StorageError
from dtrain.cluster.growing import newest_generation
from dtrain.cluster.remote import part_key
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import Storage, open_storage
from dtrain.launcher import lease
from dtrain.runtime.mirroring import Mirroring, before_commit
from dtrain.runtime.options import Options


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(mirror.VARIABLE, str(tmp_path / "node"))
    yield f"file://{tmp_path}/store"
    mirror._mirrors.clear()
    mirror._urls.clear()


def sent(store: Storage) -> str:
    generation = newest_generation(store, "metrics.jsonl")
    return store.get(part_key("metrics.jsonl", generation, 0)).decode() if generation else ""


def test_what_was_written_before_a_checkpoint_and_before_the_end_is_in_the_store(url: str) -> None:
    run, store = RunDir(url), open_storage(url)
    mirroring = Mirroring(Options(run_dir=url, job_id="job-1", node_rank=0))
    ready = before_commit(run)
    written = ""
    for waits in (ready, ready, ready, lambda: mirroring.flush(60.0), lambda: mirroring.flush(60.0), mirroring.close):
        written += "line\n"
        run.metrics.write_text(written)
        waits()
        assert sent(store) == written


def test_a_store_that_fails_is_asked_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirroring = Mirroring(Options(run_dir=url, job_id="job-1", node_rank=0))
    push, failures = mirror.Mirror.push, iter([StorageError("it is away"), OSError("it is full")])

    def failing(self: mirror.Mirror) -> None:
        for error in failures:
            raise error
        push(self)

    monkeypatch.setattr(mirror.Mirror, "push", failing)
    RunDir(url).metrics.write_text("line\n")
    assert mirroring.flush(60.0)
    assert sent(open_storage(url)) == "line\n"
    mirroring.close()


def test_of_two_launches_that_saw_no_other_one_is_busy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_newest_claim", lambda store: None)
    with lease.launching(RunDir(url), "job-1"), pytest.raises(lease.Busy), lease.launching(RunDir(url), "job-2"):
        pass
