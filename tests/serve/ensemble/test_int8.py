"""int8 rows do not depend on each other, stay close to float32, and take heads of their own."""

from __future__ import annotations

import pytest
import torch

from tigerbot.errors import ModelError
from tigerbot.int8 import Int8Linear, quantise
from tigerbot.models import load_model
from tigerbot.spec import MembersSpec
from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.ensemble.heads import load_heads
from tigerbot_serve.ensemble.load import load_members
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, Feed

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no int8 kernels for this processor"
)


@torch.inference_mode()
def test_a_row_has_the_same_numbers_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    small = Int8Linear(linear.weight, linear.bias)
    x_Ni = torch.randn(5, 64) * torch.tensor([[0.01], [1.0], [100.0], [3.0], [0.0]])

    together = small(x_Ni)

    assert all(torch.equal(small(x_Ni[row : row + 1])[0], together[row]) for row in range(5))
    exact = linear(x_Ni)
    assert float((together - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(together[4], linear.bias)


@torch.inference_mode()
def test_served_states_are_those_that_heads_are_trained_on(world) -> None:
    ids = [5, 9, 30, 31, 32, 7]
    members = load_members(MembersSpec(**world.members("lora"), dtype="int8"))
    feed = Feed((ids,), (0,))

    served = members.forward(members.caches(1, 16), (feed, feed))

    for side, folder in ((CREATIVE, world.creative), (FACTUAL, world.factual)):
        expert = quantise(load_model(folder).eval())
        read = expert.get_base_model().model(input_ids=torch.tensor([ids])).last_hidden_state
        state = served[side]
        assert state is not None
        torch.testing.assert_close(state, read, atol=0.02, rtol=0.02)  # a rounding may fall the other way
        plain = load_model(folder).eval().get_base_model().model(input_ids=torch.tensor([ids])).last_hidden_state
        assert float((state - read).norm()) < 0.2 * float((state - plain).norm())


def test_ends_of_the_dial_hold_in_int8(spec_of_members, world, ask, tokenizer) -> None:
    prompts = [tuple(tokenizer.encode(text)) for text in ("狐狸在河", "The fox", "月亮")]
    engine = build_engine(spec_of_members(world.members("lora") | {"dtype": "int8"}))
    requests = [
        Request(prompt, max_tokens=12, dial=dial, temperature=0.0)
        for prompt, dial in zip(prompts, (0.0, 0.5, 1.0), strict=True)
    ]

    engine.start()
    try:
        together = ask(engine, *requests)
        alone = [ask(engine, request)[0] for request in requests]
    finally:
        engine.stop(timeout_s=10)

    for one, other in zip(together, alone, strict=True):
        assert one.ids == other.ids
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-4)


def test_heads_of_another_quantisation_are_refused(world, heads) -> None:
    members = load_members(MembersSpec(**world.members("lora"), dtype="int8"))

    with pytest.raises(ModelError, match="quantisation is none, served is int8"):
        load_heads(heads(), members.hashes, members.width)

    load_heads(heads(quantisation="int8"), members.hashes, members.width)
