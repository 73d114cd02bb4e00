"""Limits, budgets, admission and idempotency of the gateway, as the official client and its headers show them."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tigerbot.spec.access import AccessSpec, BudgetSpec, LimitsSpec
from tigerbot_serve.engine.request import EngineStats
from tigerbot_serve.gateway.admission import Admission
from tigerbot_serve.gateway.bank import Bank
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.key_file import new_key
from tigerbot_serve.gateway.keys import OPEN, KeyRing
from tigerbot_serve.gateway.leased_limiter import LeasedLimiter
from tigerbot_serve.gateway.ledger import Ledger, Tokens

HTTP = httpx.Client(timeout=30)
ASK: Any = [{"role": "user", "content": "The fox sings."}]
KEYS = KeyRing(hashlib.sha256(key).digest() for key in (b"one", b"two"))


def client(url: str, key: str = "one", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=30)


def chat(api: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "tiger", "messages": ASK, "max_tokens": 16} | fields
    return api.chat.completions.with_raw_response.create(**asked)


def post(url: str, key: str = "one", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "tiger", "messages": ASK, "max_tokens": 16} | fields
    named = {"authorization": f"Bearer {key}"} | (headers or {})
    return HTTP.post(f"{url}/v1/chat/completions", json=body, headers=named)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


class Background:
    """A request that is under way while the test goes on."""

    def __init__(self, send: Callable[[], Any]) -> None:
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(send,), daemon=True)
        self._thread.start()

    def _run(self, send: Callable[[], Any]) -> None:
        try:
            self.result = send()
        except Exception as error:
            self.result = error

    def join(self) -> Any:
        self._thread.join(20)
        return self.result


def test_every_answer_says_where_the_key_stands(serve_free) -> None:
    free = serve_free(keys=KEYS, access={"limits": {"requests_per_minute": 3, "tokens_per_minute": 1000}})

    answer = chat(client(free.url))
    used = answer.parse().usage.total_tokens
    refused = post(free.url, messages=[])

    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s") and answer.headers["x-ratelimit-reset-tokens"]
    assert len(answer.headers["x-request-id"]) == 16
    assert refused.status_code == 400 and refused.headers["x-ratelimit-remaining-requests"] == "2"
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) == 1000 - used, "what was not used came back"


def test_a_minutes_requests_are_counted_for_each_key_and_a_refusal_says_when_to_come_back(serve_free) -> None:
    free = serve_free(keys=KEYS, access={"limits": {"requests_per_minute": 2}})
    for _ in range(2):
        chat(client(free.url))

    with pytest.raises(openai.RateLimitError) as refused:
        chat(client(free.url))

    assert refused.value.code == "rate_limit_exceeded"
    headers = refused.value.response.headers
    assert 0 < int(headers["retry-after"]) <= 61 and int(headers["retry-after-ms"]) <= 1000 * int(
        headers["retry-after"]
    )
    assert chat(client(free.url, "two")).status_code == 200
    assert len(free.decoder.submitted) == 3


def test_tokens_are_reserved_while_a_request_runs_and_given_back_after_it(serve_free) -> None:
    free = serve_free(keys=KEYS, hold=True, access={"limits": {"tokens_per_minute": 100}})
    running = Background(lambda: post(free.url, max_tokens=60))
    until(lambda: bool(free.decoder.submitted))

    assert post(free.url, max_tokens=60).json()["error"]["code"] == "rate_limit_exceeded"
    free.decoder.release()
    assert running.join().status_code == 200

    assert post(free.url, max_tokens=60).status_code == 200
    too_large = post(free.url, max_tokens=200)
    assert too_large.status_code == 429 and too_large.headers["x-should-retry"] == "false"


def test_requests_at_a_time_are_bounded_and_a_client_that_leaves_makes_room(serve_free) -> None:
    free = serve_free(keys=KEYS, hold=True, access={"limits": {"concurrent": 1, "tokens_per_minute": 500}})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{free.url}/v1/chat/completions",
            json={"model": "tiger", "messages": ASK, "max_tokens": 400},
            headers={"authorization": "Bearer one"},
            timeout=0.5,
        )
    free.decoder.release()

    until(lambda: post(free.url, max_tokens=400).status_code == 200)


def test_a_budget_is_kept_over_a_restart(serve_free) -> None:
    access = {"limits": {"budget": {"tokens": 60, "per": "month"}}}
    before = serve_free(keys=KEYS, access=access)
    while (answer := post(before.url)).status_code == 200:
        pass
    assert answer.json()["error"]["code"] == "insufficient_quota" and answer.headers["x-should-retry"] == "false"
    before.close()

    after = serve_free(keys=KEYS, access=access)

    with pytest.raises(openai.RateLimitError) as refused:
        chat(client(after.url, retries=2))
    assert refused.value.code == "insufficient_quota"
    assert post(after.url, "two").status_code == 200 and len(after.decoder.submitted) == 1


def test_scopes_and_own_limits_come_from_the_key_file(serve_free, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    _, reader = new_key(path, "reader", expires=None, scopes=("embeddings",))
    entry, talker = new_key(path, "talker", expires=None, scopes=("chat",))
    text = path.read_text().replace(f"id: {entry.id}\n", f"id: {entry.id}\n  limits: {{requests_per_minute: 7}}\n")
    path.write_text(text)
    free = serve_free(keys=KeyRing(file=path))

    with pytest.raises(openai.PermissionDeniedError) as refused:
        chat(client(free.url, reader))

    assert refused.value.code == "insufficient_permissions"
    assert chat(client(free.url, talker)).headers["x-ratelimit-limit-requests"] == "7"
    assert client(free.url, reader).models.list().data


def test_a_request_that_stands_behind_too_many_tokens_is_told_when_to_come_back(serve_free) -> None:
    free = serve_free(keys=KEYS, access={"max_outstanding_tokens": 500})
    free.decoder.outstanding = 5_000

    with pytest.raises(openai.RateLimitError) as refused:
        chat(client(free.url))

    assert refused.value.code == "overloaded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    free.decoder.outstanding = 0
    until(lambda: post(free.url).status_code == 200)


def test_the_time_to_come_back_is_the_excess_over_the_pace() -> None:
    now, there = [0.0], [1000]
    stats = lambda: EngineStats(1, 1, 0, there[0], 0, 0)  # noqa: E731
    admission = Admission(stats, 1000, clock=lambda: now[0], jitter=lambda: 0.0)

    admission.check(0)
    for _ in range(20):  # 100 tokens a second leave
        now[0] += 1
        there[0] -= 100
        admission.took(100)
        there[0] += 100
        admission.check(0)

    assert admission.wait_s(550) == pytest.approx(6)
    with pytest.raises(ApiError) as refused:
        admission.check(550)
    assert refused.value.headers["retry-after"] == "6"
    there[0] = 0
    now[0] += 1
    admission.check(5_000)  # an idle engine takes what it is given


def test_the_same_request_twice_is_one_generation(serve_free) -> None:
    free = serve_free(keys=KEYS, hold=True)
    named = {"idempotency-key": "a1"}
    first, second = (Background(lambda: post(free.url, headers=named)) for _ in range(2))
    until(lambda: bool(free.decoder.submitted))
    free.decoder.release()

    later = post(free.url, headers=named)

    assert len({answer.json()["id"] for answer in (first.join(), second.join(), later)}) == 1
    assert len(free.decoder.submitted) == 1 and later.headers["idempotency-replayed"] == "true"
    other = post(free.url, headers=named, max_tokens=17)
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
    assert post(free.url, "two", headers=named, max_tokens=17).status_code == 200, "another key's names are its own"
    assert "idempotency-replayed" not in post(free.url, headers={"idempotency-key": "a2"}).headers


def test_a_generation_goes_on_for_a_client_that_comes_back(serve_free) -> None:
    free = serve_free(keys=KEYS, hold=True)
    headers = {"authorization": "Bearer one", "idempotency-key": "a1"}
    body = {"model": "tiger", "messages": ASK, "max_tokens": 16}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{free.url}/v1/chat/completions", json=body, headers=headers, timeout=0.5)
    free.decoder.release()

    assert post(free.url, headers={"idempotency-key": "a1"}).status_code == 200

    assert len(free.decoder.submitted) == 1


def test_a_stream_is_replayed_as_it_was(serve_free) -> None:
    free = serve_free(keys=KEYS)
    named = {"idempotency-key": "s1"}

    first, second = (post(free.url, headers=named, stream=True).text for _ in range(2))

    assert first == second and first.endswith("data: [DONE]\n\n") and len(free.decoder.submitted) == 1
    chunks = client(free.url).chat.completions.create(
        model="tiger",
        messages=ASK,
        max_tokens=16,
        stream=True,
        extra_headers=named,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hi " * 4


def test_a_refusal_that_a_retry_may_overcome_is_not_kept(serve_free) -> None:
    free = serve_free(keys=KEYS)
    named = {"idempotency-key": "a1"}
    free.decoder.bug = RuntimeError("out of memory")
    assert post(free.url, headers=named).status_code == 500
    free.decoder.bug = None

    assert post(free.url, headers=named).status_code == 200


def test_the_deadline_is_ours_whatever_a_client_says_to_ray_serve(serve_free) -> None:
    free = serve_free(keys=KEYS, hold=True, http={"request_timeout_s": 0.3})
    headers = {"x-request-timeout-seconds": "-1", "x-request-disconnect-disabled": "?1"}

    late = post(free.url, headers=headers)

    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    until(lambda: free.decoder.stats().slots_used == 0)


class Fleet:
    """Limiters of several replicas over one bank that can be out of reach."""

    def __init__(self, limits: LimitsSpec, replicas: int = 2) -> None:
        self.ledger, self.calls, self.reachable = Ledger(), 0, True
        self.bank = Bank(self.ledger)
        spec = AccessSpec(limits=limits)
        self.limiters = [LeasedLimiter(spec, self._sync_of(f"r{i}"), replicas=replicas) for i in range(replicas)]

    def _sync_of(self, name: str) -> Any:
        async def sync(asks: Any) -> Any:
            await asyncio.sleep(0)
            self.calls += 1
            if not self.reachable:
                raise ConnectionError("the bank is gone")
            return self.bank.sync(name, asks)

        return sync

    async def ask(self, place: int, tokens: int = 10) -> int:
        """The status that a request gets which uses half of its tokens."""
        limiter = self.limiters[place]
        try:
            await limiter.ready(OPEN, Tokens(completion=tokens))
            held = limiter.reserve(OPEN, Tokens(completion=tokens))
        except ApiError as error:
            return error.status
        limiter.settle(held, Tokens(completion=tokens // 2))
        return 200

    def close(self) -> None:
        for limiter in self.limiters:
            limiter.close()


def test_replicas_together_let_through_what_the_key_may_with_few_calls() -> None:
    async def story() -> None:
        fleet = Fleet(LimitsSpec(requests_per_minute=40))
        statuses = [await fleet.ask(index % 2) for index in range(400)]
        assert statuses.count(200) <= 40 and statuses.count(429) >= 360
        assert fleet.calls < 60
        fleet.close()

    asyncio.run(story())


def test_a_bank_out_of_reach_leaves_every_replica_its_share_and_hears_of_it_later() -> None:
    budget = BudgetSpec(tokens=10_000)

    async def story() -> None:
        fleet = Fleet(LimitsSpec(requests_per_minute=10, budget=budget))
        fleet.reachable = False
        statuses = [await fleet.ask(0) for _ in range(8)]
        assert statuses.count(200) == 5 and statuses.count(429) == 3
        fleet.reachable = True
        end = time.monotonic() + 20
        while fleet.ledger.spent(OPEN.id, budget, time.time()) < 25:
            assert time.monotonic() < end
            statuses.append(await fleet.ask(0))
            await asyncio.sleep(0.1)
        statuses += [await fleet.ask(1) for _ in range(10)]
        assert statuses.count(200) <= 10, "what was let through without the bank counts"
        fleet.close()

    asyncio.run(story())
