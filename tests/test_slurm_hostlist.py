"""slurm/hostlist.py against what `scontrol show hostnames` and `show hostlistsorted` print."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.slurm.hostlist import compress, expand

PAIRS = [
    ("node[1-3,07-09],gpu-a", ["node1", "node2", "node3", "node07", "node08", "node09", "gpu-a"]),
    ("n[098-102]", ["n098", "n099", "n100", "n101", "n102"]),
    ("n[98-102]", ["n98", "n99", "n100", "n101", "n102"]),
    ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
    ("rack[1]-x", ["rack1-x"]),
    ("a,b2,c", ["a", "b2", "c"]),
    ("a1b[2,5-6]", ["a1b2", "a1b5", "a1b6"]),
    ("", []),
    ("(null)", []),
]


@pytest.mark.parametrize(("text", "names"), PAIRS)
def test_expand(text: str, names: list[str]) -> None:
    assert expand(text) == names
    assert sorted(expand(compress(names))) == sorted(names)


def test_compress() -> None:
    assert compress(["n5", "n1", "n2", "x", "n1"]) == "n[1-2,5],x"
    assert compress(["n098", "n099", "n100"]) == "n[098-100]"
    assert compress(["n1", "n01"]) == "n1,n01"
    assert compress(["gpu-a", "7"]) == "gpu-a,7"


@pytest.mark.parametrize(
    "text", ["n[1-", "n1-2]", "n[[1]]", "n[2-1]", "n[a-b]", "n[]", "n[1-99999999]", "n[1-2000][1-2000]"]
)
def test_what_is_no_list_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"brackets do not match|is no list|runs backwards|more than"):
        expand(text)


@given(st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), unique=True))
def test_names_survive(names: list[str]) -> None:
    assert sorted(expand(compress(names))) == sorted(names)


def test_a_large_cluster() -> None:
    names = [f"gpu-{rack:02}-{node:03}" for rack in range(100) for node in range(100)]
    started = time.perf_counter()
    assert expand(compress(names)) == names
    assert time.perf_counter() - started < 2
