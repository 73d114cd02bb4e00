"""Ask an OpenAI-compatible endpoint many questions at once.

It takes `Ask`s and gives `Answer`s in the same order. It knows nothing about what is right: `measure` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tigerbot.errors import ServeError


@dataclass(frozen=True)
class Ask:
    """One request: a prompt at a dial with a seed. `verify=False` measures the dial alone, without the judge."""

    prompt: str
    dial: float
    seed: int
    max_tokens: int = 48
    verify: bool = False
    tokens: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back: the text and the `ensemble` object."""

    text: str
    ensemble: dict[str, Any]


async def ask_all(
    url: str,
    asks: Sequence[Ask],
    *,
    api_key: str = "",
    concurrency: int = 16,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Send every request, `concurrency` at a time.

    Raises:
        ServeError: the endpoint cannot be reached, or answered with an error three times in a row to one request.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    gate, finished = asyncio.Semaphore(concurrency), 0

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:

        async def one(ask: Ask) -> Answer:
            nonlocal finished
            async with gate:
                answer = await _ask(client, ask)
            finished += 1
            if done is not None:
                done(finished)
            return answer

        return list(await asyncio.gather(*(one(ask) for ask in asks)))


async def _ask(client: httpx.AsyncClient, ask: Ask) -> Answer:
    body = {
        "model": "tiger",
        "messages": [{"role": "user", "content": ask.prompt}],
        "creativity": ask.dial,
        "seed": ask.seed,
        "max_tokens": ask.max_tokens,
        "verify": ask.verify,
        "ensemble_tokens": ask.tokens,
    }
    problem = ""
    for attempt in range(3):
        try:
            response = await client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if response.status_code == 200:
                reply = response.json()
                return Answer(reply["choices"][0]["message"]["content"] or "", reply.get("ensemble") or {})
            problem = f"HTTP {response.status_code} {response.text[:200]}"
            if response.status_code in (400, 401, 403, 404):
                break
        await asyncio.sleep(0.5 * 2**attempt)
    raise ServeError(f"no answer ({problem})", where=str(client.base_url), fix="is the endpoint up and the key right?")
