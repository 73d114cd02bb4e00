"""A replica whose memory runs out: who is told what, what is left behind, who is served afterwards."""

from __future__ import annotations

import hashlib
import json
import time
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch

from tigerbot_serve.deploy.replica import Version, replica_class
from tigerbot_serve.gateway.keys import KeyRing

HTTP = httpx.Client(timeout=60, headers={"authorization": "Bearer secret-of-one"})
CHAT = "/v1/chat/completions"
BODY = {"model": "tiger", "messages": [{"role": "user", "content": "The fox"}], "max_tokens": 6, "seed": 1}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
]


class Scarce:
    """Members whose forward passes find no memory: `times` of them, after `first` more."""

    def __init__(self, members: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception = ERRORS[0]
        self.first, self.times = 0, 0
        for name in ("forward", "read_base"):
            monkeypatch.setattr(members, name, self._guarded(getattr(members, name)))

    def _guarded(self, real: Any) -> Any:
        def guarded(*given: Any, **named: Any) -> Any:
            if self.first:
                self.first -= 1
            elif self.times:
                self.times -= 1
                raise self.error
            return real(*given, **named)

        return guarded


@pytest.fixture
def scarce(serve_engine, monkeypatch) -> tuple[Any, Scarce]:
    access = {"limits": {"concurrent": 1, "budget": {"tokens": 10_000, "per": "day"}}}
    served = serve_engine(keys=KeyRing([hashlib.sha256(b"secret-of-one").digest()]), access=access)
    return served, Scarce(served.engine.members, monkeypatch)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "python", "cpu"])
@pytest.mark.parametrize("first", [0, 2], ids=["in the prompt", "in the answer"])
def test_a_request_without_memory_is_one_to_ask_again_and_leaves_nothing_behind(scarce, error, first) -> None:
    served, memory = scarce
    good = HTTP.post(served.url + CHAT, json=BODY).json()["choices"]
    memory.error, memory.first, memory.times = error, first, 2  # what is kept for later prompts goes first, then it

    refused = HTTP.post(served.url + CHAT, json=BODY | {"user": "b"})

    found = refused.json()["error"]
    assert (refused.status_code, found["type"], found["code"]) == (503, "server_error", "out_of_memory")
    assert refused.headers["retry-after"] == "1" and "x-should-retry" not in refused.headers
    memory.times = 0
    served.settle()
    after = HTTP.post(served.url + CHAT, json=BODY)  # the key may have one request at a time: the last one is settled
    assert after.status_code == 200 and after.json()["choices"] == good


def test_a_stream_without_memory_ends_with_the_error_and_no_done(scarce) -> None:
    served, memory = scarce
    memory.first, memory.times = 2, 2

    lines = HTTP.post(served.url + CHAT, json=BODY | {"stream": True, "verify": False}).text.split("\n\n")

    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "out_of_memory"
    assert not any("[DONE]" in line for line in lines)
    served.settle()
    until = time.monotonic() + 30
    while HTTP.post(served.url + CHAT, json=BODY).status_code != 200:
        assert time.monotonic() < until, "the key's one place is still taken"
        time.sleep(0.05)


def test_the_official_client_asks_again_and_gets_its_answer(scarce) -> None:
    served, memory = scarce
    memory.times = 1
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret-of-one", max_retries=2, timeout=60)

    answer = api.chat.completions.create(**BODY)
    memory.times = 1
    vectors = api.embeddings.create(model="tiger", input="fox", encoding_format="float")

    assert answer.choices[0].finish_reason and len(vectors.data[0].embedding) > 1
    assert memory.times == 0


def test_a_replica_that_starves_says_so_until_it_gets_a_token(scarce) -> None:
    served, memory = scarce
    version = Version(served.engine.spec, KeyRing(), "0", None)  # type: ignore[arg-type]
    replica = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine=served.engine)))
    check_health = replica_class(version).check_health
    memory.times = 1000

    for _ in range(3):
        check_health(replica)
        assert HTTP.post(served.url + CHAT, json=BODY).status_code == 503

    with pytest.raises(RuntimeError, match="no memory left"):
        check_health(replica)
    memory.times = 0
    assert HTTP.post(served.url + CHAT, json=BODY).status_code == 200
    check_health(replica)
