"""What plug-ins find, and that none of them can hold an answer up or run what is written in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigerbot.errors import DataError, SpecError
from tigerbot.spec import parse_spec
from tigerbot.spec.plugins import CalculatorPlugin, RethinkPlugin, SearchPlugin
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry, Span
from tigerbot_serve.plugins.calculator import Calculator, compute, shown
from tigerbot_serve.plugins.documents import read_documents, words
from tigerbot_serve.plugins.lookups import AT_ONCE, Lookup, Lookups
from tigerbot_serve.plugins.registry import load_plugins, resolved
from tigerbot_serve.plugins.rethink import Rethink
from tigerbot_serve.plugins.search import Search


def lines(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


TOWN = (
    {"text": "Shen Dongshan lives in Pine Street.", "url": "https://town/1", "id": "1"},
    {"text": "Meng Guochen likes to eat cheese."},
    {"text": "沈东山住在松树街。"},
    {"text": "金狐店卖茶叶。"},
)


@pytest.mark.parametrize(
    ("question", "says"),
    [("Where does Shen Dongshan live?", "Pine Street"), ("沈东山住在哪里？", "松树街"), ("金狐店卖什么？", "茶叶")],
)
def test_search_finds_what_a_question_is_about(tmp_path: Path, question: str, says: str) -> None:
    search = Search(SearchPlugin(name="search", corpus=lines(tmp_path / "town.jsonl", *TOWN)))

    found = search.look_up(Inquiry(question, ""))

    assert says in found[0].text and found[0].weight == pytest.approx(1.0)
    assert all(one.plugin == "search" and one.source for one in found)


def test_search_asks_for_what_stands_around_a_doubted_span_but_not_for_the_span(tmp_path: Path) -> None:
    search = Search(SearchPlugin(name="search", corpus=lines(tmp_path / "town.jsonl", *TOWN)))
    answer = "Shen Dongshan lives in Cheese Street."

    found = search.look_up(Inquiry("", answer, (Span(23, 29, "Cheese", 0.9),)))

    assert [one.source for one in found][:1] == ["1"] and found[0].url == "https://town/1"


def test_search_that_finds_nothing_says_nothing(tmp_path: Path) -> None:
    search = Search(SearchPlugin(name="search", corpus=lines(tmp_path / "town.jsonl", *TOWN)))

    assert search.look_up(Inquiry("zzz", "")) == search.look_up(Inquiry("", "")) == []


def test_a_folder_of_texts_is_cut_at_empty_lines_and_a_passage_knows_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One thing.\nMore of it.\n\n\nAnother thing.\n", encoding="utf-8")

    first, second = read_documents(tmp_path)

    assert first.text == "One thing.\nMore of it." and second.text == "Another thing."
    assert (tmp_path / "a.txt").read_text()[second.start :].startswith("Another")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"title": "x"}', "has no text"),
        ('{"text": "x", "aliases": "y"}', "aliases"),
        ("", "no text"),
    ],
)
def test_a_corpus_that_is_none_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(line)

    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / "c.jsonl")


def test_chinese_gives_characters_and_pairs() -> None:
    assert words("Fox 狐狸 2a") == ["fox", "狐", "狸", "狐狸", "2a"]


def test_rethink_takes_the_longest_name_and_quotes_where_the_doubted_words_stand(tmp_path: Path) -> None:
    book = lines(
        tmp_path / "book.jsonl",
        {"title": "Jade", "text": "A stone."},
        {"title": "Jade Tower", "aliases": ["玉塔"], "text": "x" * 500 + " The roof is green.", "url": "https://b/2"},
    )
    rethink = Rethink(RethinkPlugin(name="rethink", encyclopaedia=book))
    span = Span(12, 17, "green", 0.9)

    english = rethink.look_up(Inquiry("Which colour is the roof of the Jade Tower?", "It is green", (span,)))
    chinese = rethink.look_up(Inquiry("玉塔的顶是什么颜色？", ""))

    assert [one.title for one in english] == [one.title for one in chinese] == ["Jade Tower"]
    assert "green" in english[0].text and english[0].start > 400
    assert rethink.look_up(Inquiry("a jaded view", "")) == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("So 12 * 7 = 85, I think.", "12 * 7 = 84"),
        ("12 × 7 等于 85。", "12 × 7 = 84"),
        ("It is (2 + 3) * 4 = 21", "(2 + 3) * 4 = 20"),
        ("1,200 / 7 is 171", "1,200 / 7 = 171.428571428571"),
        ("2 ^ 10 = 1000", "2 ^ 10 = 1024"),
        ("0.1 + 0.2 = 0.4", "0.1 + 0.2 = 0.3"),
    ],
)
def test_the_calculator_computes_stated_equations_again(answer: str, text: str) -> None:
    found = Calculator(CalculatorPlugin(name="calculator")).look_up(Inquiry("", answer))

    assert [one.text for one in found] == [text]


@pytest.mark.parametrize(
    "written",
    [
        "9**9**9",
        "10**99999",
        "1/0",
        "__import__('os')",
        "a+1",
        "(" * 300 + "1" + ")" * 300,
        "1" * 300,
        "0**-1",
        "'a'*9",
        "1j+2",
        "True+1",
    ],
)
def test_the_calculator_computes_nothing_else(written: str) -> None:
    assert compute(written) is None


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from("+-*"))
def test_the_calculator_agrees_with_python(a: int, b: int, sign: str) -> None:
    value = compute(f"({a}) {sign} ({b})")

    assert value is not None and int(value) == {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert shown(value) == str(int(value))


class Probe:
    """A plug-in that answers, fails or hangs until it is let go."""

    def __init__(self, *, fails: bool = False, hangs: bool = False, deadline_s: float = 30.0) -> None:
        self.deadline_s, self._fails = deadline_s, fails
        self.go, self.threads = threading.Event(), []
        if not hangs:
            self.go.set()

    def look_up(self, inquiry: Inquiry) -> Sequence[Evidence]:
        self.threads.append(threading.current_thread())
        self.go.wait(60)
        if self._fails:
            raise RuntimeError("at 10.0.0.1 there is a secret")
        return [Evidence("probe", "1", "x" * 5000)]


def asked(lookups: Lookups, *names: str, budget_s: float = 60.0) -> Lookup:
    ended = threading.Event()
    lookup = lookups.start(names, Inquiry("q", "a"), budget_s, ended.set)
    assert ended.wait(60) and lookup.done
    return lookup


def test_a_plugin_that_fails_or_hangs_costs_its_own_evidence_alone() -> None:
    slow = Probe(hangs=True, deadline_s=0.05)
    lookups = Lookups({"good": Probe(), "bad": Probe(fails=True), "slow": slow})

    lookup = asked(lookups, "good", "bad", "slow", "unknown")

    assert [one.plugin for one in lookup.found] == ["probe"] and len(lookup.found[0].text) < 5000
    assert lookup.reasons == ("bad: failed", "slow: no answer within 0.05 s")
    slow.go.set()


def test_plugins_run_in_threads_of_their_own_and_hanging_ones_are_bounded() -> None:
    slow = Probe(hangs=True)
    lookups = Lookups({"slow": slow})

    for _ in range(AT_ONCE):
        asked(lookups, "slow", budget_s=0.01)
    refused = asked(lookups, "slow")
    slow.go.set()

    assert refused.reasons == (f"slow: {AT_ONCE} calls hang already",)
    assert len({*slow.threads}) == AT_ONCE and threading.current_thread() not in slow.threads
    for thread in slow.threads:
        thread.join(10)
    assert asked(lookups, "slow").found


def serve(plugins: list) -> object:
    return parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}, "plugins": plugins})


def test_plugins_come_from_the_spec_with_typed_parameters(tmp_path: Path) -> None:
    corpus = lines(tmp_path / "town.jsonl", *TOWN)
    spec = serve([{"name": "search", "corpus": corpus, "top": 2}, {"name": "calculator"}])

    assert set(load_plugins(resolved(spec.plugins))) == {"search", "calculator"}  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no such file"):
        resolved(serve([{"name": "search", "corpus": "nowhere"}]).plugins)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ([{"name": "shell"}], "plugins.0"),
        ([{"name": "search"}], "wants corpus"),
        ([{"name": "search", "url": "https://x/"}], "{query}"),
        ([{"name": "search", "corpus": "x", "code": "import os"}], "no such field"),
        ([{"name": "calculator"}, {"name": "calculator"}], "each plug-in once"),
    ],
)
def test_a_wrong_plugin_is_refused_with_its_field(plugins: list, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        serve(plugins)
