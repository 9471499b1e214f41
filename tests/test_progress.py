"""The progress record: what the writer says is what the reader sees, also from another process, stopped or dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dtrain.runtime.progress import Phase, ProgressReader, ProgressWriter, create_record


@pytest.fixture
def record() -> Iterator[int]:
    descriptor = create_record("test")
    yield descriptor
    os.close(descriptor)


def test_what_is_written_is_read(record: int) -> None:
    reader = ProgressReader(record)
    writer = ProgressWriter(record, attempt=3, global_rank=7)
    assert (reader.read().attempt, reader.read().global_rank, reader.read().phase) == (3, 7, Phase.STARTING)
    writer.step(12)
    writer.phase(Phase.BACKWARD)
    writer.collective()
    writer.collective()
    writer.place("train.py:31")
    seen = reader.read()
    assert (seen.step, seen.done, str(seen.phase), seen.collective) == (12, 11, "backward", 2)
    assert seen.place == "train.py:31"
    assert abs(time.monotonic() - seen.changed_at) < 5
    writer.done(12)
    assert (reader.read().done, reader.read().place) == (12, "train.py:31")
    reader.close()


def test_a_record_nobody_has_written_reads_as_zero(record: int) -> None:
    seen = ProgressReader(record).read()
    assert (seen.step, seen.done, seen.changed_at, seen.place) == (0, 0, 0.0, "")


def test_a_long_place_is_cut(record: int) -> None:
    ProgressWriter(record).place("é" * 500)
    assert ProgressReader(record).read().place.startswith("é" * 100)


def test_nobody_watching() -> None:
    writer = ProgressWriter(-1)
    writer.step(1)
    writer.collective()


def test_a_reader_follows_another_process_that_is_stopped_or_killed(record: int) -> None:
    program = (
        "import sys\nfrom dtrain.runtime.progress import ProgressWriter\nwriter = ProgressWriter(int(sys.argv[1]))\n"
        "step = 0\nwhile True:\n    step += 1\n    writer.step(step)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(record)], pass_fds=[record])
    try:
        reader = ProgressReader(record)
        last, deadline = 0, time.monotonic() + 30
        while last < 20_000 and time.monotonic() < deadline:
            seen = reader.read()
            assert seen.step >= last
            last = seen.step
        assert last >= 20_000
        child.send_signal(signal.SIGSTOP)
        assert reader.read().step >= last
    finally:
        child.kill()
        child.wait()
    assert reader.read().step >= last
