"""docs/backends.md is true: it says what the code's table says, and each point that it claims has a test."""

from __future__ import annotations

from pathlib import Path

import conformance

from dtrain.launcher.conformance import BACKENDS, NOT_BY_DESIGN, NOT_SHOWN, POINTS, render

PAGE = Path(__file__).parent.parent / "docs" / "backends.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == f"{render()}\n", "python -m dtrain.launcher.conformance > docs/backends.md"


def test_every_cell_has_a_test_or_a_reason() -> None:
    for backend in BACKENDS:
        file = Path(__file__).parent / f"test_conformance_{backend}.py"
        assert f'tests_of("{backend}")' in file.read_text()
        shown = {point for test in conformance.tests_of(backend) for point in conformance.SHOWS.get(test, ())}
        assert shown == {point for point in POINTS if (backend, point) not in {*NOT_BY_DESIGN, *NOT_SHOWN}}
