"""An afternoon on one chat page: many answers, new chats between them, the live panel open, and nothing grows.

`TIGER_SOAK_ANSWERS` says how many answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

ANSWERS = int(os.environ.get("TIGER_SOAK_ANSWERS", "200"))
ROUND = 10  # answers of one conversation


@dataclass(frozen=True)
class Held:
    """What the page holds after its garbage was collected."""

    nodes: int
    listeners: int
    heap_bytes: int


def held(page: Any, tools: Any) -> Held:
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    for _ in range(3):  # what finalizers let go is found by the next one
        tools.send("HeapProfiler.collectGarbage")
    found = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}
    return Held(int(found["Nodes"]), int(found["JSEventListeners"]), int(found["JSHeapUsedSize"]))


def converse(page: Any, number: int) -> None:
    """One conversation with everything that a reader does in it; it leaves a fresh chat behind."""
    for place in range(ROUND):
        page.locator("#compare").set_checked(place == ROUND - 1)
        page.locator("#verify").set_checked(place % 2 == 0)
        # Not typed: what Chromium keeps to undo an edit are nodes too, and not the page's.
        page.evaluate("text => { document.getElementById('message').value = text; }", f"The fox {number}-{place} 狐狸")
        page.locator("#message").press("Enter")
        turn = page.locator(".turn").last
        turn.locator(".answer").last.locator(".badge").wait_for()
        if turn.locator(".token").count():  # a model may have nothing to say
            turn.locator(".token").first.focus()
            page.keyboard.press("ArrowRight")
        if turn.locator(".why button").count():
            turn.locator(".why button").first.click()
    page.click("#language")
    page.click("#fresh")


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_nodes_listeners_and_heap_are_flat_over_many_answers(serve_engine, heads, page) -> None:
    served = serve_engine(heads=str(heads(p_div=0.5, p_dev=3.0)), engine={"max_length": 1000})
    page.goto(served.url)
    page.locator("body.ready").wait_for()
    page.evaluate("document.getElementById('limit').value = 12")
    page.click("#show-live")
    tools = page.context.new_cdp_session(page)
    tools.send("Performance.enable")
    for number in range(2):  # both languages, all strings, compiled code
        converse(page, number)
    before = held(page, tools)

    seen = []
    for number in range(max(2, ANSWERS // ROUND - 2)):
        converse(page, number)
        seen.append(held(page, tools))

    print(before, *seen, sep="\n")
    early, late = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for name, room in (("nodes", 8), ("listeners", 2), ("heap_bytes", 200_000)):
        was, now = (median(getattr(one, name) for one in part) for part in (early, late))
        assert now - was <= room, f"{name}: {was:,.0f}, then {now:,.0f}"
    assert page.problems == []
    served.settle()
