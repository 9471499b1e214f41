"""Attempts and the line of parents: which checkpoints are live, who goes on from where."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster.errors import CheckpointError, FencedError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.storage import ObjectInfo
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import (
    Attempt,
    check_fence,
    claim_attempt,
    live_checkpoints,
    live_steps,
    newest_attempt,
    newest_live,
)


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(str(tmp_path / "store"))


def commit(store: FileStorage, step: int, attempt: int) -> None:
    store.put_if_absent(names.manifest_key(names.step_dir(step, attempt)), b"{}")


def claim(store: FileStorage, *skip: tuple[int, int]) -> Attempt:
    return claim_attempt(store, host="here", job_id="job", skip=frozenset(skip))


def live(store: FileStorage) -> set[tuple[int, int]]:
    return {(info.step, info.attempt) for info in live_checkpoints(store) if info.live}


def test_an_empty_store(store: FileStorage) -> None:
    assert newest_attempt(store) == 0
    assert live_checkpoints(store) == []
    assert not store.root.exists()


def test_a_life_of_a_run(store: FileStorage) -> None:
    assert claim(store) == Attempt(number=1, from_step=0, from_attempt=0)
    commit(store, 100, 1)
    commit(store, 200, 1)
    assert claim(store) == Attempt(number=2, from_step=200, from_attempt=1)
    # Attempt 2 dies before it commits: the line of attempt 3 passes through attempt 1.
    assert claim(store) == Attempt(number=3, from_step=200, from_attempt=1)
    commit(store, 300, 3)
    assert live(store) == {(100, 1), (200, 1), (300, 3)}
    # A step that can't be loaded is passed over, and committed again.
    assert claim(store, (300, 3)) == Attempt(number=4, from_step=200, from_attempt=1)
    assert live(store) == {(100, 1), (200, 1)}
    commit(store, 300, 4)
    assert live(store) == {(100, 1), (200, 1), (300, 4)}
    assert [(info.step, info.attempt) for info in live_checkpoints(store)] == [(100, 1), (200, 1), (300, 3), (300, 4)]
    newest = newest_live(live_checkpoints(store))
    assert newest is not None
    assert newest.dir == "step-00000300-a0004"


def test_what_an_old_attempt_commits_late_is_never_live(store: FileStorage) -> None:
    claim(store)
    commit(store, 100, 1)
    assert claim(store).from_step == 100
    commit(store, 150, 1)
    commit(store, 900, 1)
    assert live(store) == {(100, 1)}
    assert claim(store) == Attempt(number=3, from_step=100, from_attempt=1)
    with pytest.raises(FencedError, match="attempt 3 has taken over"):
        check_fence(store, 2)
    check_fence(store, 3)


def test_the_record_says_who_and_from_where(store: FileStorage) -> None:
    claim(store)
    commit(store, 7, 1)
    claim_attempt(store, host="node-1", job_id="job-2")
    first, second = (json.loads(store.get(names.attempt_key(number))) for number in (1, 2))
    assert first["from"] is None
    assert second.pop("started_at") > 0
    assert second.pop("nonce") != first["nonce"]
    assert second == {"from": {"step": 7, "attempt": 1}, "host": "node-1", "job_id": "job-2"}


def test_a_start_of_ones_own_choice(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3):
        commit(store, step, 1)
    assert claim_attempt(store, host="h", job_id="j", fresh_from=(2, 1)).from_step == 2
    assert live(store) == {(1, 1), (2, 1)}
    assert claim_attempt(store, host="h", job_id="j", fresh_from=(0, 0)) == Attempt(
        number=3, from_step=0, from_attempt=0
    )
    assert live(store) == set()
    with pytest.raises(CheckpointError, match="step-00000009-a0001"):
        claim_attempt(store, host="h", job_id="j", fresh_from=(9, 1))


def test_of_many_claims_each_gets_a_number_of_its_own(store: FileStorage) -> None:
    numbers: list[int] = []
    start = threading.Barrier(6)

    def run() -> None:
        start.wait()
        numbers.extend(claim(store).number for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 31))


class Racing(FileStorage):
    """A store in which something happens just before the first put of an attempt."""

    def __init__(self, root: Path, before: dict[str, list[tuple[str, bool]]]) -> None:
        super().__init__(str(root))
        self._before = before

    def put_if_absent(self, key: str, data: bytes) -> None:
        for other, put in self._before.pop(key, []):
            if put:
                super().put_if_absent(other, b"{}")
            else:
                super().delete(other)
        super().put_if_absent(key, data)


def _manifest(step: int, attempt: int) -> str:
    return names.manifest_key(names.step_dir(step, attempt))


def test_a_claim_that_lost_its_start_to_retention_takes_the_next_number(tmp_path: Path) -> None:
    """The old attempt commits 200 and, keeping one, deletes 100, between the claim's look and its put."""
    store = Racing(tmp_path, {names.attempt_key(2): [(_manifest(200, 1), True), (_manifest(100, 1), False)]})
    claim(store)
    commit(store, 100, 1)
    assert claim(store) == Attempt(number=3, from_step=200, from_attempt=1)
    assert live(store) == {(200, 1)}


def test_an_attempt_that_began_from_nothing_left_does_not_cut_the_line(store: FileStorage) -> None:
    """As above, but the claimer died right after its put."""
    claim(store)
    commit(store, 100, 1)
    claim(store)
    commit(store, 200, 1)
    store.delete(_manifest(100, 1))
    assert live(store) == {(200, 1)}
    assert claim(store) == Attempt(number=3, from_step=200, from_attempt=1)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{}",
        b"[]",
        b'{"from": {"step": 1, "attempt": 1}}',
        b'{"from": {"step": -1, "attempt": 1}}',
        b'{"from": {"step": 1, "attempt": 0}}',
        b'{"from": 3}',
    ],
)
def test_a_record_that_makes_no_sense_is_said(store: FileStorage, record: bytes) -> None:
    store.put_if_absent(names.attempt_key(1), record)
    with pytest.raises(CheckpointError, match=r"attempts/0001\.json"):
        live_checkpoints(store)


def test_strange_names_are_left_alone(store: FileStorage) -> None:
    claim(store)
    commit(store, 1, 1)
    for key in ("attempts/x.json", "attempts/00009.json", "step-1-a1/manifest.json", "notes/manifest.json", "README"):
        store.put_if_absent(key, b"?")
    assert newest_attempt(store) == 1
    assert live(store) == {(1, 1)}


def test_a_long_history_is_read_along_the_line_only(tmp_path: Path) -> None:
    read: list[str] = []

    class Counting(FileStorage):
        def get(self, key: str) -> bytes:
            read.append(key)
            return super().get(key)

    store = Counting(str(tmp_path))
    claim(store)
    commit(store, 1, 1)
    for _ in range(50):
        claim(store)
    read.clear()
    assert live(store) == {(1, 1)}
    assert read == [names.attempt_key(51), names.attempt_key(1)]


class Model:
    """Brute force: what each attempt would find in its history, told step by step."""

    def __init__(self) -> None:
        self.parents: dict[int, tuple[int, int] | None] = {}
        self.committed: set[tuple[int, int]] = set()

    def history(self, attempt: int) -> set[tuple[int, int]]:
        """All that attempt may load: what it committed, and what its starting point's history held then."""
        own = {(s, a) for s, a in self.committed if a == attempt}
        parent = self.parents[attempt]
        if parent is None:
            return own
        return own | {(s, a) for s, a in self.history(parent[1]) if s <= parent[0]}

    def live(self) -> set[tuple[int, int]]:
        return self.history(max(self.parents)) if self.parents else set()


@st.composite
def histories(draw: st.DrawFn) -> Model:
    """Claims that skip at random, commits by the newest attempt and by old ones that woke late."""
    model = Model()
    for _ in range(draw(st.integers(0, 25))):
        if not model.parents or draw(st.booleans()):
            choices: list[tuple[int, int] | None] = [None, *sorted(model.live(), reverse=True)]
            model.parents[len(model.parents) + 1] = choices[min(draw(st.integers(0, 3)), len(choices) - 1)]
        else:
            attempt = draw(st.integers(1, len(model.parents)))
            parent = model.parents[attempt]
            newest = max([s for s, a in model.committed if a == attempt], default=parent[0] if parent else 0)
            model.committed.add((newest + draw(st.integers(1, 3)), attempt))
    return model


@settings(max_examples=500, deadline=None)
@given(histories())
def test_live_is_what_the_newest_attempt_could_have_loaded(model: Model) -> None:
    assert live_steps(model.parents, model.committed) == model.live()


@settings(max_examples=200, deadline=None)
@given(histories(), st.data())
def test_deleting_dead_ones_changes_nothing(model: Model, data: st.DataObject) -> None:
    before = live_steps(model.parents, model.committed)
    dead = sorted(model.committed - before)
    gone = {pair for pair in dead if data.draw(st.booleans())}
    assert live_steps(model.parents, model.committed - gone) == before


def test_list_is_the_only_way_numbers_are_found(tmp_path: Path) -> None:
    """A store whose listing lags (old object stores) still gives no number twice: the put decides."""

    class Lagging(FileStorage):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            return iter(sorted(super().list(prefix), key=lambda info: info.key)[: self.seen])

        seen = 0

    store = Lagging(str(tmp_path))
    FileStorage(str(tmp_path)).put_if_absent(names.attempt_key(1), b'{"from": null}')
    done: list[Attempt] = []
    thread = threading.Thread(target=lambda: done.append(claim(store)), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    store.seen = 10
    thread.join(20)
    assert [attempt.number for attempt in done] == [2]
