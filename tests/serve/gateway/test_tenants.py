"""What a key's prompts left cached is for that key alone, and the answer says how much of a prompt was known."""

from __future__ import annotations

import httpx
import pytest

from tigerbot_serve.gateway.keys import KeyRing

LONG = "狐狸在河边唱歌。The fox sings in the river at night. 细雨落下，月亮等待。Rain falls on the old town." * 2


def test_a_key_finds_its_own_prompts_known_and_no_others(serve_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "first-key,second-key")
    served = serve_engine(keys=KeyRing.from_environment("SOME_KEYS"), engine={"max_length": 512})

    def cached(key: str) -> int:
        body = {"model": "tiger", "prompt": LONG, "max_tokens": 2, "n": 2}
        answer = httpx.post(
            f"{served.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60
        )
        assert answer.status_code == 200
        usage = answer.json()["usage"]
        known = usage["prompt_tokens_details"]["cached_tokens"]
        assert known <= usage["prompt_tokens"]
        return known

    assert cached("first-key") == 0
    assert cached("second-key") == 0
    assert cached("first-key") >= 32
