"""The report's pictures: valid SVG for any data, text always escaped."""

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tigerbot_jobs.demo.figures import Series, chart, heat_map

numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(numbers, numbers), max_size=20), st.booleans())
def test_any_points_give_a_picture(points: list[tuple[float, float]], log_x: bool) -> None:
    picture = chart([Series("loss <val>", points)], x="步", y="loss & more", log_x=log_x)

    assert ElementTree.fromstring(picture).tag in ("svg", "p")  # a sentence where there is nothing to draw


def test_ticks_are_round_numbers() -> None:
    picture = chart([Series("a", [(0.0, 0.1), (2_300_000.0, 0.9)])], x="tokens", y="loss")

    assert all(f">{tick}<" in picture for tick in ("500k", "1M", "2M", "0.2", "0.8"))


def test_heat_map_shows_text_as_text_and_both_layers() -> None:
    page = heat_map([{"text": "<script>", "p_div": 0.25, "p_dev": None, "w": 0.5}, {"text": "虎", "p_dev": 0.75}])

    assert "<script>" not in page and "虎" in page
    assert "rgba(0,114,178,0.25)" in page and "rgba(213,94,0,0.75)" in page
