"""The engine on a GPU: the dial's ends are the single models there too. `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble.build import build_engine

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


def test_bfloat16_with_heads_says_nearly_what_float32_says(spec_of_members, world, heads, ask, tokenizer) -> None:
    """The same code path as on a CPU: fused projections, one output product, both heads at once."""
    request = Request(prompt_ids=tuple(tokenizer.encode("狐狸 fox")), max_tokens=1, dial=0.5, temperature=0.0)
    found = []
    for dtype in ("float32", "bfloat16"):
        scale = {"gpus_per_replica": 1, "threads": 1}
        spec = spec_of_members(world.members("lora") | {"dtype": dtype}, heads=str(heads(hidden=4)), scale=scale)
        engine = build_engine(spec)
        engine.start()
        try:
            found.append(ask(engine, request)[0].tokens[0])
        finally:
            engine.stop(timeout_s=10)

    assert found[0].token_id == found[1].token_id
    assert found[0].logprob == pytest.approx(found[1].logprob, abs=0.1)
