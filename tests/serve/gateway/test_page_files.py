"""The page's files, `compare` and the live numbers, without a browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from tigerbot_serve.engine.request import EngineStats
from tigerbot_serve.ensemble import review
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.live import ALONE, Live, Replicas, percentile
from tigerbot_serve.gateway.pages import FOLDER
from tigerbot_serve.gateway.recent import TENTHS, Outcomes

ASK: Any = [{"role": "user", "content": "狐狸在河边唱歌。The fox sings."}]

NOTHING = Outcomes([0] * TENTHS, None, {}, 0)


def test_the_page_and_its_files_come_with_a_policy_that_allows_nothing_inline(serve_engine) -> None:
    url = serve_engine().url

    page = httpx.get(f"{url}/")
    script = httpx.get(f"{url}/static/page.js")

    assert 'content="tiger"' in page.text and script.headers["content-type"].startswith("text/javascript")
    for response in (page, script):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page.text)
    assert httpx.get(f"{url}/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    for name in ("index.html", "nothing.js", "..%2f..%2fapp.py", "%2e%2e/app.py"):
        assert httpx.get(f"{url}/static/{name}").status_code == 404


def test_both_languages_have_every_word_that_the_page_says() -> None:
    tables = {name: json.loads((FOLDER / f"strings.{name}.json").read_text()) for name in ("en", "zh")}
    told = "".join(path.read_text() for path in FOLDER.iterdir() if path.suffix in (".html", ".js"))
    asked = set(re.findall(r"""data-(?:t|label|hint)="(\w+)"|\bt\("(\w+)"|worded\("\w+", "[^"]*", "(\w+)\"""", told))
    names = {name for found in asked for name in found if name}

    assert list(tables["en"]) == list(tables["zh"]) and len(names) > 40
    assert names <= set(tables["en"])
    holes = {name: [re.findall(r"\{\w+\}", table[name]) for table in tables.values()] for name in tables["en"]}
    assert [name for name, (en, zh) in holes.items() if sorted(en) != sorted(zh)] == []


def test_every_reason_that_a_review_gives_is_known_to_the_page_in_both_languages() -> None:
    given = set(re.findall(r'reasons\.append\("([^"]+)"\)', Path(review.__file__ or "").read_text()))
    known = dict(re.findall(r'^  "(.+)": "(reason_\w+)",$', (FOLDER / "rewrite.js").read_text(), re.MULTILINE))

    assert set(known) == given and len(given) > 5
    for name in ("en", "zh"):
        assert set(known.values()) <= set(json.loads((FOLDER / f"strings.{name}.json").read_text()))


def test_compare_gives_both_members_alone_and_the_ensemble_from_one_request(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_div=0.5, p_dev=-2.0)))
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
    fields: dict[str, Any] = {"model": "tiger", "messages": ASK, "max_tokens": 10, "seed": 7}

    def alone(dial: float) -> str | None:
        answer = api.chat.completions.create(**fields, extra_body={"creativity": dial})
        return answer.choices[0].message.content

    whole = api.chat.completions.create(**fields, extra_body={"creativity": 0.4, "compare": True})
    texts = ["", "", ""]
    dials = {}
    for chunk in api.chat.completions.create(
        **fields, stream=True, extra_body={"creativity": 0.4, "compare": True, "verify": True}
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            dials[choice.index] = chunk.ensemble["dial"]  # type: ignore[attr-defined]

    assert [choice.ensemble["dial"] for choice in whole.choices] == [1.0, 0.0, 0.4]  # type: ignore[attr-defined]
    assert [choice.message.content for choice in whole.choices] == texts == [alone(1.0), alone(0.0), alone(0.4)]
    assert dials == {0: 1.0, 1: 0.0, 2: 0.4}
    assert whole.usage is not None and whole.usage.completion_tokens <= 30
    with pytest.raises(openai.BadRequestError, match="n wants to be 1"):
        api.chat.completions.create(**fields, n=2, extra_body={"compare": True})
    served.settle()


def test_live_numbers_are_behind_the_key_and_count_answers_that_were_whole(serve_engine) -> None:
    served = serve_engine(keys=KeyRing((hashlib.sha256(b"secret").digest(),)), engine={"slots": 5})
    mine = {"authorization": "Bearer secret"}
    body = {"model": "tiger", "messages": ASK, "max_tokens": 3}

    assert httpx.get(f"{served.url}/v1/live").status_code == 401
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=mine, timeout=60).status_code == 200
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 401
    told = httpx.get(f"{served.url}/v1/live", headers=mine).json()

    assert told["replicas"] == {"RUNNING": 1} and told["slots"] == 5 and told["slots_used"] == 0
    assert told["answers"] == 1 and 0 < told["p50_s"] == told["p99_s"]


def test_rates_and_latencies_are_of_the_recent_past() -> None:
    now, decoded = [0.0], [0]
    engine: Any = SimpleNamespace(stats=lambda: EngineStats(1, 0, 0, 0, decoded[0], 0))
    live = Live(engine, clock=lambda: now[0])

    for second in range(1, 41):
        now[0], decoded[0] = float(second), decoded[0] + (100 if second <= 20 else 10)
        live.took(second / 10)
        reading = live.reading(Replicas(ALONE, {}), NOTHING)

    assert reading.tokens_per_s == pytest.approx(10)  # the fast half is more than ten seconds ago
    assert reading.answers == 40 and reading.p50_s == 2.0 and reading.p99_s == 4.0
    now[0] = 330.5
    assert live.reading(Replicas(ALONE, {}), NOTHING).answers == 10  # those of the last five minutes
    assert percentile([], 0.5) is None
