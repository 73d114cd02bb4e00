"""The chat page in a real browser over a real engine, by keyboard alone."""

from __future__ import annotations

import hashlib
from typing import Any

from tigerbot_serve.gateway.keys import KeyRing


def tab_to(page: Any, name: str) -> None:
    """Press Tab until the element of this id has the focus."""
    for _ in range(40):
        if page.evaluate("document.activeElement.id") == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"#{name} is not reached by the keyboard")


def opened(page: Any, url: str, limit: int = 12) -> None:
    page.goto(url)
    page.locator("body.ready").wait_for()
    page.evaluate("limit => { document.getElementById('limit').value = limit; }", limit)


def ask(page: Any, text: str) -> Any:
    tab_to(page, "message")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    turn.locator(".answer").last.locator(".badge, .error").wait_for()
    return turn


def test_the_keyboard_alone_asks_turns_the_dial_reads_the_heat_map_and_compares(serve_engine, heads, page) -> None:
    opened(page, serve_engine(heads=str(heads(p_div=0.5, p_dev=-2.0)), engine={"max_length": 512}).url)

    tab_to(page, "dial")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    with page.expect_request("**/v1/chat/completions") as sent:
        first = ask(page, "What does the fox do?")
    assert sent.value.post_data_json["creativity"] == 0.5 and page.locator("#shown").text_content() == "0.50"
    assert "nothing doubtful" in first.locator(".badge").text_content()
    assert first.locator(".token").count() > 3

    tab_to(page, "heat")
    page.keyboard.press("Space")
    assert page.locator("#legend").is_hidden() and not page.evaluate("document.body.classList.contains('dev')")
    page.keyboard.press("Space")
    tab_to(page, "layer-div")
    page.keyboard.press("Space")
    assert page.evaluate("[...document.body.classList].sort()") == ["dev", "gated", "heat", "ready"]
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
    tip = page.locator("#tip")
    tip.wait_for()
    assert [text.rstrip("0123456789%") for text in tip.locator("dd").all_text_contents()][1:] == ["", "", ""]

    tab_to(page, "compare")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    with page.expect_request("**/v1/chat/completions") as sent:
        second = ask(page, "狐狸在做什么？")
    assert sent.value.post_data_json["compare"] is True
    assert second.locator("h2").all_text_contents() == ["Creative alone", "Factual alone", "Ensemble"]
    assert second.locator("header small").all_text_contents() == ["dial 1.00", "dial 0.00", "dial 0.50"]
    assert any(second.locator(".text").all_text_contents())  # a fresh model may end an answer at once
    assert page.problems == []


def test_stopping_closes_the_stream_and_frees_the_slot_at_once(serve_engine, page) -> None:
    served = serve_engine(engine={"max_length": 1000, "slots": 1})
    opened(page, served.url, limit=900)
    tab_to(page, "verify")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("The fox")
    page.keyboard.press("Enter")
    page.locator(".answer .token").first.wait_for()
    assert served.engine.stats().slots_used == 1

    tab_to(page, "stop")
    page.keyboard.press("Enter")

    page.locator(".badge", has_text="Stopped").wait_for()
    served.settle()
    assert served.engine.stats().tokens_decoded < 900
    assert page.locator("#send").is_visible() and page.evaluate("document.activeElement.id") == "message"


def test_the_next_question_carries_the_conversation_and_the_system_message(serve_engine, page) -> None:
    opened(page, serve_engine(engine={"max_length": 512}).url)
    page.click("#show-settings")
    page.fill("#system", "Be short.")
    answer = ask(page, "One").locator(".text").text_content()

    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Two")

    told = [(row["role"], row["content"]) for row in sent.value.post_data_json["messages"]]
    assert told[0] == ("system", "Be short.") and told[1] == ("user", "One") and told[3] == ("user", "Two")
    assert told[2][0] == "assistant" and told[2][1].split() == answer.split()
    page.click("#fresh")
    assert page.locator(".turn").count() == 0 and page.locator("#intro").is_visible()


def test_the_live_panel_shows_the_replica_and_asks_again(serve_engine, page) -> None:
    opened(page, serve_engine(engine={"slots": 3}).url)
    ask(page, "The fox")

    tab_to(page, "show-live")
    page.keyboard.press("Enter")

    page.locator(".tile").first.wait_for()
    tiles = page.locator(".tile b").all_text_contents()
    assert tiles[0] == "1" and tiles[1].endswith(" / 3") and tiles[2] == "0"
    with page.expect_response("**/v1/live"):
        pass
    page.wait_for_function("document.querySelectorAll('.tile b')[4].textContent.endsWith('s')")
    page.keyboard.press("Enter")
    assert page.locator("#live").is_hidden()


def test_the_live_panel_shows_how_creative_tokens_were_and_how_checks_came_out(serve_engine, heads, page) -> None:
    opened(page, serve_engine(heads=str(heads(p_dev=3.0)), engine={"max_length": 512}).url)
    page.evaluate("document.getElementById('rewrites').value = 0")
    tab_to(page, "dial")
    page.keyboard.press("End")
    ask(page, "The fox")
    tab_to(page, "dial")
    page.keyboard.press("Home")
    ask(page, "The rain")

    tab_to(page, "show-live")
    page.keyboard.press("Enter")
    page.locator(".bars li").first.wait_for()

    shares = [int(text.split(": ")[1].split("%")[0]) for text in page.locator(".bars li").all_text_contents()]
    assert len(shares) == 10 and shares[0] > 0 and shares[9] > 0 and sum(shares[1:9]) == 0
    high = page.locator(".bars li").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
    assert max(high) > 10 and high[4] == 0
    checked = page.locator(".tile", has_text="checked").first
    assert checked.locator("b").text_content() == "0%" and "of 2 checked" in checked.text_content()
    assert "fine 0, doubtful 1, unchecked 1" in checked.text_content()
    page.locator("#language").press("Enter")
    page.locator(".tile", has_text="存疑 1").wait_for()
    assert page.problems == []


def test_a_key_is_kept_only_when_its_box_is_ticked(serve_engine, page) -> None:
    served = serve_engine(keys=KeyRing((hashlib.sha256(b"secret").digest(),)))
    opened(page, served.url)
    page.fill("#message", "Hello")
    page.keyboard.press("Enter")
    page.locator(".error").wait_for()
    assert "API key" in page.locator(".error").text_content()
    assert page.evaluate("document.activeElement.id") == "key" and page.input_value("#message") == "Hello"

    page.keyboard.type("secret")
    ask(page, "")
    assert page.evaluate("localStorage.getItem('tiger.key')") is None
    page.check("#remember")
    opened(page, served.url)
    assert page.input_value("#key") == "secret"
    page.click("#show-settings")
    page.uncheck("#remember")
    assert page.evaluate("JSON.stringify([localStorage, sessionStorage])").find("secret") < 0


def test_phone_and_dark_mode_hold_the_whole_page(serve_engine, page) -> None:
    opened(page, serve_engine().url)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme="dark")
    page.click("#language")
    page.check("#compare")

    ask(page, "The fox sings at night")

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    page.reload()
    page.locator("body.ready").wait_for()
    assert page.locator("#send").text_content() == "提问"  # the language is kept


def test_the_accepted_question_is_seen_before_its_answer(serve_engine, heads, page) -> None:
    opened(page, serve_engine(heads=str(heads(p_dev=3.0))).url)
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
             const now = document.querySelector('.phases [aria-current]');
             if (now && seen.at(-1) !== now.textContent) seen.push(now.textContent);
           }).observe(document.getElementById('turns'), {subtree: true, childList: true}); }"""
    )

    turn = ask(page, "The fox sings")

    phases = page.evaluate("seen")
    order = ["accepted", "drafting", "checking", "rewriting"]
    assert phases == [one for one in order if one in phases] and {"drafting", "rewriting"} <= set(phases)
    assert "Doubtful" in turn.locator(".badge").text_content()
