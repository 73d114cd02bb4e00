"""Pictures of the chat page for the README: `python scripts/chat_pictures.py URL FOLDER`.

URL is an endpoint over the demo's models (`tiger demo`, then `tiger serve` of its folders). Every question has a seed of
its own, so that the same models give the same pictures. Needs chromium, and a font with Chinese characters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

CHAT = "**/v1/chat/completions"
LIMIT = 190_000  # bytes; a picture above it gets a palette: a README is loaded often


@dataclass(frozen=True)
class Ask:
    """One question, how it is asked, and what is done when the answer is there."""

    text: str
    dial: float
    seed: int = 1
    compare: bool = False
    rewrites: int = 1
    then: Callable[[Any], None] = lambda turn: None


@dataclass(frozen=True)
class Scene:
    """One picture."""

    name: str
    locale: str
    asks: tuple[Ask, ...]
    last: Callable[[Any], None] = lambda page: None
    live: bool = False
    dark: bool = False


def why(turn: Any) -> None:
    turn.locator(".why button").click()


def point_at_doubt(page: Any) -> None:
    """Open the tooltip of the word on the page that most likely leaves the facts."""
    words = page.locator(".text .token")
    risks = words.evaluate_all("nodes => nodes.map(node => Number(node.style.getPropertyValue('--dev')) || 0)")
    words.nth(risks.index(max(risks))).focus()


# As high as the conversation and the controls under it.
TALL = "Math.ceil(turns.getBoundingClientRect().bottom + scrollY + ask.offsetHeight + 24)"

FACT, STORY = "Where does Shen Dongshan live?", "Tell a story about the moon."
SCENES = (
    Scene("chat-en", "en-US", (Ask(FACT, 0.6, seed=0, then=why), Ask(STORY, 0.8))),
    Scene(
        "chat-zh",
        "zh-CN",
        (Ask("讲一个关于月亮的小故事。", 0.8, seed=3), Ask("沈海月生于何年？", 0.6, seed=7, then=why)),
        live=True,
    ),
    Scene(
        "compare",
        "en-US",
        (
            Ask("Write a short story about the river.", 0.5, seed=2, compare=True),
            Ask("Where does Zhou Dongchen live?", 0.5, seed=2, compare=True),
        ),
    ),
    Scene("heatmap", "en-US", (Ask(FACT, 0.6, seed=0, rewrites=0), Ask(STORY, 0.7, seed=3)), last=point_at_doubt),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="the name of one scene")
    told = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for scene in SCENES:
            if told.only in (None, scene.name):
                out = told.folder / f"{scene.name}.png"
                take(browser, told.url, scene, out)
                print(f"{out}: {out.stat().st_size:,} bytes")
        browser.close()


def take(browser: Any, url: str, scene: Scene, out: Path) -> None:
    context = browser.new_context(
        viewport={"width": 1000, "height": 1000},
        locale=scene.locale,
        color_scheme="dark" if scene.dark else "light",
        device_scale_factor=2,
    )
    page = context.new_page()
    page.goto(url)
    page.locator("body.ready").wait_for()
    if scene.live:
        page.click("#show-live")
        page.locator(".tile").first.wait_for()
    for ask in scene.asks:
        put(page, ask)
    if scene.live:
        with others(url):
            for _ in range(5):
                with page.expect_response("**/v1/live"):
                    pass
            page.evaluate("new Promise(requestAnimationFrame)")
    page.set_viewport_size({"width": 1000, "height": page.evaluate(TALL)})
    scene.last(page)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=out)
    context.close()
    picture = Image.open(out).convert("RGB")
    picture.save(out, optimize=True)
    if out.stat().st_size > LIMIT:
        picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3).save(out, optimize=True)


@contextmanager
def others(url: str, count: int = 6) -> Iterator[None]:
    """As if `count` others asked for stories meanwhile: an idle endpoint makes a dull panel."""
    over = threading.Event()

    def go_on(number: int) -> None:
        body: dict[str, Any] = {"model": "tiger", "messages": [{"role": "user", "content": STORY}], "creativity": 0.8}
        while not over.is_set():
            httpx.post(f"{url}/v1/chat/completions", json=body | {"seed": number}, timeout=60)

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()


def put(page: Any, ask: Ask) -> None:
    """Ask on the page; the seed, which the page does not send, is put into the request on its way."""

    def seeded(route: Any) -> None:
        body = json.loads(route.request.post_data) | {"seed": ask.seed}
        route.continue_(post_data=json.dumps(body))

    page.unroute(CHAT)
    page.route(CHAT, seeded)
    page.locator("#dial").fill(str(ask.dial))
    page.locator("#compare").set_checked(ask.compare)
    page.evaluate("count => { document.getElementById('rewrites').value = count; }", str(ask.rewrites))
    page.fill("#message", ask.text)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    turn.locator(".answer").last.locator(".badge").wait_for(timeout=60_000)
    page.evaluate("document.activeElement.blur()")
    ask.then(turn)


if __name__ == "__main__":
    main()
