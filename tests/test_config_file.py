"""YAML with places, layers, references and binding, below the level of a whole config."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.cluster.bind import bind
from dtrain.cluster.configfile import Node, dump_yaml, from_plain, read_text, to_plain
from dtrain.cluster.layers import merge_layers, parse_overrides
from dtrain.cluster.references import resolve_references


def _read(text: str) -> Node:
    node, problems = read_text(text, "f.yaml")
    assert problems == []
    assert node is not None
    return node


def _same(node: Node) -> Node:
    return node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("1e-4", 1e-4),
            ("3.0e-4", 3e-4),
            ("1E5", 1e5),
            (".5", 0.5),
            ("5.", 5.0),
            ("-1.5", -1.5),
            ("1_000.5", 1000.5),
        ),
        *(("10", 10), ("-3", -3), ("+3", 3), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("007", 7)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        *(("12:30", "12:30"), ("2026-01-01", "2026-01-01"), ("1.2.3", "1.2.3"), ("12e4567", "12e4567"), ("e5", "e5")),
        *(
            ('"1e-4"', "1e-4"),
            ("'yes'", "yes"),
            ('"true"', "true"),
            ("!!str 5", "5"),
            ("y", "y"),
            ("infinity", "infinity"),
        ),
        *((".inf", math.inf), ("-.INF", -math.inf)),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = to_plain(_read(f"k: {text}\n"))["k"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_knows_its_line() -> None:
    node = _read("a:\n  b: 1\n  c:\n    - 2\n    - d: 3\ne: {f: 4}\n")
    assert isinstance(node.value, dict)
    section = node.value["a"].value
    assert isinstance(section, dict)
    items = section["c"].value
    assert isinstance(items, list)
    places = [node.value["a"], section["b"], section["c"], items[0], items[1], node.value["e"]]
    assert [place.where for place in places] == [f"f.yaml:{line}" for line in (1, 2, 3, 4, 5, 6)]


def test_merge_keys_and_anchors() -> None:
    assert to_plain(_read("base: &b {x: 1, y: 2}\nown: {<<: *b, y: 3}\n"))["own"] == {"x": 1, "y": 3}


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    _, problems = read_text("\n".join(lines), "f.yaml")
    assert [problem.message for problem in problems] == ["expands to more than 100000 values. Use fewer aliases (*)."]


_plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=8), _plain_values, max_size=3))
def test_what_is_dumped_is_read_back(value: dict[str, Any]) -> None:
    assert to_plain(_read(dump_yaml(value))) == value
    assert to_plain(_read(dump_yaml(value, flow=True))) == value
    assert "\n" not in dump_yaml(value, flow=True)


@given(text=st.from_regex(r"[-+0-9.eExo_:~ynoftrue<]{1,8}", fullmatch=True))
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert to_plain(_read(dump_yaml({"k": text}))) == {"k": text}


# ---- layers ----


def _merged(*layers: Any) -> Any:
    node, problems = merge_layers([from_plain(layer, f"layer {i}") for i, layer in enumerate(layers)], _same)
    assert problems == []
    return to_plain(node)


def test_mappings_merge_and_everything_else_replaces() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert _merged(base, {"a": {"y": [3]}}, {"b": {"z": 0}}) == {"a": {"x": 1, "y": [3]}, "b": {"z": 0}}


def test_another_target_inherits_no_keywords() -> None:
    base = {"m": {"_target_": "a.B", "width": 1}}
    assert _merged(base, {"m": {"width": 2}}) == {"m": {"_target_": "a.B", "width": 2}}
    assert _merged(base, {"m": {"_target_": "a.C", "depth": 2}}) == {"m": {"_target_": "a.C", "depth": 2}}


def test_order_of_overrides_within_a_target_does_not_matter() -> None:
    base = from_plain({"o": {"_target_": "a.B", "lr": 1, "betas": 2}}, "f.yaml:1")
    for words in (["o.lr=5", "o._target_=a.C"], ["o._target_=a.C", "o.lr=5"]):
        layer, problems = parse_overrides(words, _same)
        assert problems == []
        assert to_plain(merge_layers([base, layer], _same)[0]) == {"o": {"_target_": "a.C", "lr": 5}}


def test_overrides_are_yaml_and_reach_into_lists() -> None:
    layer, problems = parse_overrides(["a.b=[1, x]", "c=1e-3", "d.1.lr=2", "e=", "f=a=b"], _same)
    assert problems == []
    base = from_plain({"d": [{"lr": 0}, {"lr": 0, "match": "*"}]}, "f.yaml:1")
    merged = merge_layers([base, layer], _same)[0]
    assert to_plain(merged) == {
        "a": {"b": [1, "x"]}, "c": 1e-3, "d": [{"lr": 0}, {"lr": 2, "match": "*"}], "e": None, "f": "a=b"
    }  # fmt: skip


_trees = st.recursive(
    st.integers(),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3),
    max_leaves=6,
)
_mappings = st.dictionaries(st.sampled_from("abc"), _trees, max_size=3)


@given(a=_mappings, b=_mappings)
def test_merging_is_idempotent_and_the_last_layer_wins(a: dict[str, Any], b: dict[str, Any]) -> None:
    merged = _merged(a, b)
    assert _merged(merged, b) == merged
    assert _merged(a, {}) == a
    assert all(merged[key] == b[key] for key in b if not isinstance(b[key], dict))


# ---- references ----


def _resolved(tree: dict[str, Any], **environ: str) -> Any:
    node, problems = resolve_references(from_plain(tree, "f.yaml:1"), environ, {})
    assert problems == []
    return to_plain(node)


def test_references_keep_types_and_chain() -> None:
    tree = {
        "n": 3,
        "x": {"y": "${n}"},
        "z": "${x.y}",
        "all": "${x}",
        "text": "run-${z}-${env:USER}",
        "l": [1, "${l.0}"],
    }
    assert _resolved(tree, USER="me") == {
        "n": 3, "x": {"y": 3}, "z": 3, "all": {"y": 3}, "text": "run-3-me", "l": [1, 1]
    }  # fmt: skip


def test_environment_values_are_read_like_unquoted_text() -> None:
    assert _resolved({"a": "${env:N}", "b": "x${env:N}"}, N="1e-3") == {"a": 1e-3, "b": "x1e-3"}


def test_dollar_dollar_is_literal_and_stays_so_when_referred_to() -> None:
    assert _resolved({"a": "$${n}", "b": "${a}", "c": "<${a}>", "d": "$n ${e}", "e": "$"}) == {
        "a": "${n}", "b": "${n}", "c": "<${n}>", "d": "$n $", "e": "$"
    }  # fmt: skip


def test_references_reach_through_references() -> None:
    assert _resolved({"s": {"t": "$${n}", "u": "${n}"}, "r": "${s}", "a": "${r.t}", "b": "${r.u}", "n": 1}) == {
        "s": {"t": "${n}", "u": 1}, "r": {"t": "${n}", "u": 1}, "a": "${n}", "b": 1, "n": 1
    }  # fmt: skip


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert _resolved({"a": "~/data", "b": "x~/y", "c": "${a}/z"}) == {
        "a": "/h/data",
        "b": "x~/y",
        "c": "/h/data/z",
    }


def test_a_circle_is_reported_once_and_harms_nothing_else() -> None:
    tree = {"a": "${b}", "b": "${c}", "c": "${a}", "d": "fine", "e": "${d}"}
    node, problems = resolve_references(from_plain(tree, "f.yaml:1"), {}, {})
    assert [problem.message for problem in problems] == [
        "the references go in a circle: a -> b -> c -> a. Write one of them out."
    ]
    assert to_plain(node) == {"a": None, "b": None, "c": None, "d": "fine", "e": "fine"}


def test_a_section_that_contains_its_own_reference() -> None:
    _, problems = resolve_references(from_plain({"m": {"x": "${m}", "y": 1}}, "f.yaml:1"), {}, {})
    assert [problem.key for problem in problems] == ["m"]


# ---- binding ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    size: int = field(metadata={"min": 1, "max": 4})
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Inner
    ratio: float = 0.5
    many: int | Literal["auto"] = field(default="auto", metadata={"min": 1})
    every: int | str | None = None
    words: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    maybe: Inner | None = None


def test_binding_to_types() -> None:
    node = _read(
        "{inner: {size: 2}, ratio: 1, many: 3, every: 5, words: [a, 7], env: {N: 007, F: true},\n"
        "maybe: {size: 1, mode: slow}}"
    )
    bound, problems = bind(Outer, node)
    assert problems == []
    assert bound == Outer(
        inner=Inner(size=2), ratio=1.0, many=3, every=5, words=("a", "7"), env={"N": "007", "F": "true"},
        maybe=Inner(size=1, mode="slow"),
    )  # fmt: skip
    assert type(bound.ratio) is float


def test_binding_reports_every_problem() -> None:
    node = _read(
        "inner: {size: 9, mode: fats}\nratio: x\nmany: 0\nwords: [a, [b]]\nenv: {N: null}\nmaybe: {}\nother: 1\n"
    )
    bound, problems = bind(Outer, node, "top")
    assert bound is None
    assert {(p.where, p.key) for p in problems} == {
        ("f.yaml:1", "top.inner.size"), ("f.yaml:1", "top.inner.mode"), ("f.yaml:2", "top.ratio"),
        ("f.yaml:3", "top.many"), ("f.yaml:4", "top.words.1"), ("f.yaml:5", "top.env.N"),
        ("f.yaml:6", "top.maybe.size"), ("f.yaml:7", "top.other"),
    }  # fmt: skip
    assert next(p.message for p in problems if p.key == "top.inner.size") == (
        "expects a whole number between 1 and 4, found the number 9."
    )
