"""The chat page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 900, "height": 900}, locale="en-US")
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    yield page
    page.close()


def ask(page: Any, text: str) -> Any:
    page.fill("#message", text)
    page.click("#send")
    turn = page.locator(".turn").first
    turn.locator(".verdict").wait_for(timeout=20_000)
    return turn


def test_both_languages_are_asked_and_every_token_shows_its_two_probabilities(serve_engine, heads, page) -> None:
    served = serve_engine(heads=str(heads(p_div=0.5, p_dev=-2.0)))
    page.goto(served.url)

    for text in ("What does the fox do?", "狐狸在做什么？"):
        turn = ask(page, text)
        assert turn.locator(".asked").text_content() == text
        assert turn.locator(".token").count() > 3
        assert turn.locator(".token i.p_div").count() == turn.locator(".token i.p_dev").count() > 3
        assert "judged: ok" in turn.locator(".verdict").text_content()
    page.click("#language")
    assert page.locator("h1").text_content().startswith("Tiger：")
    assert page.problems == []


def test_the_dial_is_sent_with_the_question(serve_engine, page) -> None:
    page.goto(serve_engine().url)
    page.locator("#dial").fill("0.85")

    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello")

    assert sent.value.post_data_json["creativity"] == 0.85
    assert page.locator("#shown").text_content() == "0.85"


def test_a_rewrite_stands_beside_its_draft(serve_engine, heads, page) -> None:
    # The second reading of the rewrite cannot be better than the draft's, so any margin below zero keeps it.
    served = serve_engine(heads=str(heads(p_dev=0.1, hidden=4)), judge={"threshold": 0.0, "margin": 0.0})
    page.goto(served.url)
    page.locator("#dial").fill("0.6")

    turn = ask(page, "The fox sings")

    verdict = turn.locator(".verdict").get_attribute("class")
    assert turn.locator(".draft").count() == (1 if "rewritten" in verdict else 0)
    assert "verdict" in verdict


def test_what_a_model_writes_stays_text(serve_engine, page) -> None:
    page.goto(serve_engine().url)
    hostile = {"text": "<img src=x onerror=alert(1)><script>alert(2)</script>", "p_div": 0.5, "p_dev": 0.5, "w": 0.5}

    page.evaluate("token => document.getElementById('turns').append(tokenNode(token))", hostile)

    assert page.locator("#turns img, #turns script").count() == 0
    assert "<img src=x" in page.locator("#turns").text_content()


def test_a_refused_key_is_said_on_the_page(serve_engine, page) -> None:
    from tigerbot_serve.gateway.keys import KeyRing

    page.goto(serve_engine(keys=KeyRing((b"0" * 32,))).url)
    page.fill("#message", "Hello")
    page.click("#send")

    page.locator(".error").wait_for(timeout=10_000)
    assert "API key" in page.locator(".error").text_content()
