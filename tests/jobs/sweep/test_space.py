"""Spaces: what can be drawn, under which conditions, what is derived, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigerbot.errors import SpecError
from tigerbot_jobs.sweep.arithmetic import Expression
from tigerbot_jobs.sweep.space import Space

SPACE = {
    "lr": {"log_uniform": ["1e-5", "1e-1"]},
    "layers": {"int": [1, 4]},
    "width": {"log_int": [16, 256]},
    "optimizer": {"choice": ["adamw", "中"]},
    "betas": {"choice": [[0.9, 0.95], [0.9, 0.99]], "when": {"optimizer": "adamw"}},
    "tokens": {"derive": "20 * layers * width + extra"},
}


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=5, max_size=5))
def test_every_place_of_the_cube_is_a_point_of_the_space(units: list[float]) -> None:
    space = Space(SPACE)

    point = space.at(units, {"extra": 1})

    assert 1e-5 <= point["lr"] <= 1e-1 and 1 <= point["layers"] <= 4 and 16 <= point["width"] <= 256
    assert ("betas" in point) == (point["optimizer"] == "adamw")
    assert point["tokens"] == 20 * point["layers"] * point["width"] + 1
    assert "extra" not in point and space.holds(point)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"lr": {"loguniform": [1, 2]}}, "space.lr: got loguniform, wants one of uniform, .*did you mean log_uniform?"),
        ({"lr": {"log_uniform": [0, 2]}}, "bounds above 0"),
        ({"lr": {"uniform": [2, 1]}}, "low < high"),
        ({"lr": {"uniform": [0, float("inf")]}}, "low < high"),
        ({"n": {"int": [1, 2.5]}}, "whole numbers"),
        ({"n": {"choice": 3}}, "choice wants a list"),
        ({}, "names no field"),
        ({"a": {"derive": "1 + 1"}}, "every field is derived"),
        ({"a": {"choice": [1], "when": {"bb": 1}}, "b": {"choice": [1]}}, "no drawn field bb; did you mean b?"),
        ({"a": {"choice": [1], "when": {"b": 2}}, "b": {"choice": [1, 3]}}, r"when.b: never holds: b is never 2"),
        (
            {
                "a": {"choice": [1, 2]},
                "b": {"choice": [1], "when": {"a": 1}},
                "c": {"int": [1, 9], "when": {"b": 1, "a": 2}},
            },
            r"c.when.a: never holds: a would be 2, and 1 for another condition",
        ),
        ({"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}}, "in a circle"),
        ({"a": {"choice": [1], "when": 3}}, "when wants field: value"),
    ],
)
def test_a_space_that_is_none_is_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Space(field)


def test_an_expression_over_an_unknown_field_names_the_nearest() -> None:
    space = Space({"batch": {"choice": [1, 2]}, "tokens": {"derive": "20 * bacth"}})

    with pytest.raises(SpecError, match=r"there is no field bacth; did you mean batch\?"):
        space.check_names({})


def test_a_grid_wants_choices_and_counts_each_point_once() -> None:
    with pytest.raises(SpecError, match="a grid wants a choice"):
        Space({"lr": {"uniform": [0, 1]}}).grid()

    grid = Space({"a": {"choice": [1, 2]}, "b": {"choice": [3, 4], "when": {"a": 1}}}).grid()

    assert grid == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2}]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "().__class__",
        "[1][0]",
        "lambda: 1",
        "a if b else c",
        "f'{a}'",
        "a.b()",
        "'x'",
        "a b",
        "True and a",
    ],
)
def test_an_expression_is_arithmetic_only(text: str) -> None:
    with pytest.raises(SpecError, match="derive"):
        Expression(text, "space.x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14),
        ("train.lr * 2", 1.0),
        ("min(7, train.lr)", 0.5),
        ("-2 ** 2", -4),
        ("7 // 2 % 2", 1),
        ("int(sqrt(9))", 3),
    ],
)
def test_an_expression_has_its_value(text: str, value: float) -> None:
    assert Expression(text, "x").value({"train.lr": 0.5}) == value


@pytest.mark.parametrize("text", ["1 / 0", "9 ** 9 ** 9 ** 9", "log(0)", "x * 2"])
def test_an_expression_without_a_value_says_so(text: str) -> None:
    with pytest.raises(SpecError, match="has no value for"):
        Expression(text, "space.y").value({"x": "text"})
