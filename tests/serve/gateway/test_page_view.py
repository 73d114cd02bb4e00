"""What the chat page makes of a stream: canned answers through the page's own files, in a real browser."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from tigerbot.spec import parse_spec
from tigerbot_serve.engine.request import EngineStats
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing

CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The page without an engine: every question is answered by the test."""
    engine: Any = SimpleNamespace(
        alive=True, max_length=64, tokenizer=None, stats=lambda: EngineStats(1, 0, 0, 0, 0, 0)
    )
    spec: Any = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}})
    server = uvicorn.Server(uvicorn.Config(create_app(engine, spec, KeyRing()), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def opened(site: str, page: Any) -> Any:
    page.goto(site)
    page.locator("body.ready").wait_for()
    return page


def token(text: str, **fields: Any) -> dict[str, Any]:
    return {"text": text, "p_div": 0.5, "p_dev": 0.1, "w": 0.4} | fields


def stream(tokens: list[dict[str, Any]], **ensemble: Any) -> str:
    """A whole stream of one choice."""

    def chunk(delta: dict[str, Any], told: dict[str, Any], reason: str | None = None) -> str:
        body = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "ensemble": told}
        return f"data: {json.dumps(body)}\n\n"

    end = {"dial": 0.3, "w_mean": 0.4, "verdict": "ok", "rewrites": 0, "tokens": tokens} | ensemble
    pieces = [chunk({"content": one["text"]}, {"tokens": [one]}) for one in tokens]
    return "".join([chunk({"content": ""}, {}), *pieces, chunk({}, end, "stop"), "data: [DONE]\n\n"])


def ask(page: Any, body: str = "", **answer: Any) -> Any:
    """Ask, and answer with this body, or with a refusal."""
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(**({"content_type": "text/event-stream", "body": body} | answer)))
    page.fill("#message", "Hello")
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    turn.locator(".badge, .error").first.wait_for()
    return turn


def test_what_a_model_writes_stays_text(opened) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script> [x](javascript:alert(3)) **<b onclick=1>**"
    opened.on("dialog", lambda dialog: opened.problems.append(dialog.message))

    turn = ask(opened, stream([token(hostile)], draft=hostile, verdict="rewritten", reasons=[hostile]))
    turn.locator(".why button").click()

    assert turn.locator("img, script, a, b").count() == 0
    assert "<img src=x onerror=alert(1)>" in turn.locator(".text").first.text_content()
    assert opened.problems == []


def test_markup_of_a_message_becomes_elements_and_words_keep_their_numbers(opened) -> None:
    text = "A **bold** word and `code`:\n\n- one\n- two\n\n3. three\n\n```py\nx = '**no**'\n```\nend"
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]

    body = ask(opened, stream([token(piece) for piece in pieces])).locator(".text")

    assert body.locator("strong").text_content() == "bold" and body.locator("p code").text_content() == "code"
    assert body.locator("ul li").all_text_contents() == ["one", "two"]
    assert body.locator("ol").get_attribute("start") == "3" and body.locator("ol li").text_content() == "three"
    assert body.locator("pre code").text_content() == "x = '**no**'"
    assert body.locator("strong .token").count() > 0
    assert float(body.locator(".token").first.evaluate("node => node.style.getPropertyValue('--dev')")) == 0.1


def test_bytes_of_a_character_are_one_word_of_the_map(opened) -> None:
    tokens = [token("", p_dev=0.9, gated=True), token("狐", p_dev=0.2, w=0.6, gated=True), token("狸", gated=False)]

    turn = ask(opened, stream(tokens))

    assert turn.locator(".token").all_text_contents() == ["狐", "狸"]
    turn.locator(".token").first.hover()
    assert opened.locator("#tip dd").all_text_contents() == ["狐", "90%", "50%", "50%", "yes"]


def test_a_skipped_expert_is_dots_above_the_word_a_row_of_its_tip_and_a_layer_of_the_legend(opened) -> None:
    layer = opened.locator("#layer-gated")
    ask(opened, stream([token("plain ")]))
    assert layer.is_hidden()  # nothing here is skipped, so there is nothing to explain

    turn = ask(opened, stream([token("both ", gated=False), token("one", w=1.0, gated=True)]))

    both, one = turn.locator(".token").all()
    drawn = "node => getComputedStyle(node).textDecorationLine + ' ' + getComputedStyle(node).textDecorationStyle"
    assert (both.evaluate(drawn), one.evaluate(drawn)) == ("none solid", "overline dotted")
    both.focus()
    assert opened.locator("#tip .gated").count() == 0
    opened.keyboard.press("ArrowRight")
    assert described(opened) == (
        "one",
        "word one may leave the facts 10% room for ideas 50% creative weight 100% second expert skipped yes",
    )
    opened.locator("#layer-div").focus()
    opened.keyboard.press("Tab")
    opened.keyboard.press("Space")
    assert one.evaluate(drawn) == "none solid" and not layer.is_checked()
    opened.click("#language")
    assert "跳过第二位专家" in opened.locator(".layer.skipped").text_content()
    opened.reload()
    opened.locator("body.ready").wait_for()
    assert not layer.is_checked() and opened.locator("#layer-div").is_checked()  # layers are kept
    assert opened.problems == []


def described(page: Any) -> tuple[str, str]:
    """Name and description that a screen reader is given for what has the focus."""
    tools = page.context.new_cdp_session(page)
    tools.send("DOM.enable")
    tools.send("Accessibility.enable")
    node = tools.send("Runtime.evaluate", {"expression": "document.activeElement"})["result"]["objectId"]
    (found,) = tools.send("Accessibility.getPartialAXTree", {"objectId": node, "fetchRelatives": False})["nodes"]
    tools.detach()
    text = page.evaluate("document.activeElement.textContent")
    return text, " ".join(found["description"]["value"].split())


def test_every_control_has_a_name_for_a_screen_reader_in_both_languages(opened) -> None:
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea')].filter(node => {
        const label = node.getAttribute('aria-label') || [...(node.labels || [])].map(one => one.textContent).join('');
        return !(label + (node.localName === 'button' ? node.textContent : '')).trim();
    }).map(node => node.id)"""
    ask(opened, stream([token("x")], verdict="flagged"))

    for language in ("en", "zh-Hans"):
        assert opened.evaluate("document.documentElement.lang") == language
        assert opened.evaluate(nameless) == []
        assert opened.locator("#dial").get_attribute("aria-valuetext").startswith("0.30")
        opened.click("#language")


def test_a_rewrite_shows_its_changes_reasons_and_evidence_on_demand(opened) -> None:
    draft = [
        token("He lives"),
        token(" in"),
        token(" Mi", p_dev=0.8),
        token("ll", p_dev=0.2),
        token(" Street", p_dev=0.6),
        token("."),
    ]
    evidence = [
        {"title": "Register", "url": "https://example.org/a?b=1", "text": "Harbour Street"},
        {"title": "Bad", "url": "javascript:alert(1)"},
        "a bare line",
    ]
    final = [token("He lives in Harbour Street.")]

    turn = ask(
        opened,
        stream(final, verdict="rewritten", draft="He lives in Mill Street.", draft_tokens=draft, evidence=evidence),
    )

    assert "Rewritten" in turn.locator(".badge").text_content()
    why = turn.locator(".why button")
    assert why.get_attribute("aria-expanded") == "false" and turn.locator(".because").is_hidden()
    why.press("Enter")
    assert turn.locator("del").evaluate("node => node.lastChild.data") == "Mill"
    assert turn.locator("ins").evaluate("node => node.lastChild.data") == "Harbour"
    assert opened.evaluate("document.activeElement.textContent") == "Mill Street"
    assert "“Mill Street” was 80% likely" in turn.locator(".because").text_content()
    link = turn.locator(".because a")
    assert link.count() == 1 and link.get_attribute("href") == "https://example.org/a?b=1"
    assert {"noopener", "nofollow"} <= set(link.get_attribute("rel").split())


def test_all_that_the_judge_doubted_is_marked_and_its_reasons_are_told_in_the_pages_language(opened) -> None:
    tokens = [token("🦊 1973"), token(" in "), token("Mill"), token(" Street.")]
    flagged = [
        {"start": 10, "end": 21, "text": "Mill Street", "p_dev": 0.7},
        {"start": 4, "end": 5, "text": "7", "p_dev": 0.61},
        {"start": 5, "end": 6, "text": "3", "p_dev": 0.4},
        {"start": 0, "end": 3, "text": "elsewhere", "p_dev": 0.9},
    ]
    reasons = ["the rewrite is no better", "search: no answer within 2 s"]

    turn = ask(opened, stream(tokens, verdict="flagged", flagged=flagged, reasons=reasons))
    turn.locator(".why button").press("Enter")

    assert turn.locator("mark").all_text_contents() == ["1973", "Mill Street"]
    assert turn.locator(".because p.text").text_content() == "🦊 1973 in Mill Street."
    assert opened.evaluate("document.activeElement.textContent") == "1973"
    opened.click("#language")
    assert turn.locator(".because li").all_text_contents() == [
        "“1973”有 61% 的可能偏离事实。",
        "“Mill Street”有 70% 的可能偏离事实。",
        "改写并没有更好。",
        "search: no answer within 2 s",
    ]


def test_a_difference_goes_by_words_and_in_chinese_by_characters(opened) -> None:
    compare = """async ([one, two]) => (await import('/static/diff.js')).diff(one, two)
        .map(step => ({same: '=', removed: '-', added: '+'})[step.kind] + step.text)"""

    assert opened.evaluate(compare, ["the old mill", "the new mill"]) == ["=the ", "-old", "+new", "= mill"]
    assert opened.evaluate(compare, ["住在北大街", "住在松树街"]) == ["=住在", "-北大", "+松树", "=街"]
    assert opened.evaluate(compare, ["1973年。", "1913年。"]) == ["-1973", "+1913", "=年。"]
    assert opened.evaluate(compare, ["", "new"]) == ["+new"]
    assert opened.evaluate(compare, ["same", "same"]) == ["=same"]
    assert (
        len(opened.evaluate(compare, ["a b " * 2000, "c d " * 2000])) == 2
    )  # too long to compare, not too long to show


def test_a_refusal_over_the_limit_counts_down_and_then_asks_again(opened) -> None:
    refusal = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
    turn = ask(opened, json.dumps(refusal), status=429, headers={"retry-after": "2"}, content_type="application/json")

    assert "Over the limit" in turn.locator(".error").text_content()
    assert "Ask again in" in turn.locator(".countdown").text_content()
    again = turn.locator("button", has_text="Ask again")
    assert again.is_disabled()
    opened.unroute(CHAT)
    opened.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=stream([token("Hi.")])))
    again.click()  # waits until it is enabled
    opened.locator(".turn").last.locator(".badge").wait_for()
    assert opened.locator(".turn").last.locator(".text").text_content() == "Hi."


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"body": 'data: {"error": {"message": "late", "code": "timeout"}}\n\n'}, "took too long"),
        ({"body": stream([token("half")])[:300]}, "connection broke"),
        ({"body": "<html>bad gateway", "status": 500, "content_type": "text/html"}, "HTTP 500"),
        ({"body": '{"error": {"message": "one\\ntwo"}}', "status": 400}, "one"),
    ],
)
def test_an_error_is_one_line_and_the_question_is_kept(opened, answer, said) -> None:
    turn = ask(opened, **answer)

    line = turn.locator(".error").text_content()
    assert said in line and "\n" not in line and "two" not in line
    assert opened.input_value("#message") == "Hello"
    assert turn.locator(".error").get_attribute("role") == "alert"
