"""What is told of every token, from the engine through HTTP to the words on the page."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

ASK: Any = [{"role": "user", "content": "狐狸在河边唱歌。The fox sings."}]


@pytest.fixture
def gated_url(serve_engine, heads) -> str:
    """An ensemble whose dial stands so far out that the gate skips the factual member now and then."""
    options = {"max_length": 256, "gate": {"min_run": 2, "max_debt": 4}}
    served = serve_engine(
        heads=str(heads()), dial={"mix": "linear", "a": 0.05, "b": 0.05, "default": 0.93}, engine=options
    )
    return served.url


def test_the_tokens_that_the_gate_skipped_say_so_streamed_and_whole(gated_url) -> None:
    api = openai.OpenAI(base_url=f"{gated_url}/v1", api_key="none", max_retries=0, timeout=60)
    fields: dict[str, Any] = {"model": "tiger", "messages": ASK, "max_tokens": 40, "temperature": 0.0}
    more = {"ensemble_tokens": True, "verify": False}

    whole: Any = api.chat.completions.create(**fields, extra_body=more)
    chunks: Any = list(api.chat.completions.create(**fields, stream=True, extra_body=more))

    tokens = whole.ensemble["tokens"]
    gated = [token["gated"] for token in tokens]
    assert 0 < sum(gated) < len(gated)
    assert sum(gated) == pytest.approx(whole.ensemble["gate_rate"] * whole.usage.completion_tokens, abs=1)
    assert {token["w"] for token in tokens if token["gated"]} == {1.0}
    told = [getattr(chunk, "ensemble", None) or {} for chunk in chunks[:-1]]
    streamed = [token for ensemble in told for token in ensemble.get("tokens", ())]
    assert (
        [token["gated"] for token in streamed] == gated == [token["gated"] for token in chunks[-1].ensemble["tokens"]]
    )
    schema = httpx.get(f"{gated_url}/openapi.json").json()["components"]["schemas"]["TokenShown"]
    assert schema["properties"]["gated"]["type"] == "boolean" and "gated" in schema["required"]
