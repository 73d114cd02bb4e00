"""The engine on a GPU: the dial's ends are the single models there too. `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from tigerbot_serve.engine.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("dial", [0.0, 0.5, 1.0])
def test_a_gpu_and_a_cpu_choose_the_same_tokens(engine_of, ask, tokenizer, dial: float) -> None:
    request = Request(prompt_ids=tuple(tokenizer.encode("狐狸 fox")), max_tokens=12, dial=dial, temperature=0.0)

    here = ask(engine_of("lora"), request)[0]
    there = ask(engine_of("lora", scale={"gpus_per_replica": 1, "threads": 1}), request)[0]

    assert here.ids == there.ids
