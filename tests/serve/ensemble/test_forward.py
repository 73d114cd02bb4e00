"""The forward pass of our own says what transformers' says, and what it saves changes no number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tigerbot.errors import ModelError
from tigerbot.models import add_lora, load_model, save_model
from tigerbot.spec import DialSpec, Lora, MembersSpec
from tigerbot_serve.engine.kv_cache import KVCache
from tigerbot_serve.engine.request import Request
from tigerbot_serve.ensemble import load as load_module
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.ensemble.decoder import LlamaDecoder, llama_like
from tigerbot_serve.ensemble.dial import mix
from tigerbot_serve.ensemble.heads import load_heads
from tigerbot_serve.ensemble.load import load_members
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, NOTHING, Feed, Members
from tigerbot_serve.ensemble.mixture import Mixture, Plan
from tigerbot_serve.ensemble.twins import TwinFinder

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama3 angles": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_our_forward_is_transformers_forward_over_chunks_and_rows_of_any_length(kind: str) -> None:
    torch.manual_seed(1)
    model = MODELS[kind]().eval()
    ids = [torch.randint(3, 97, (20,)), torch.randint(3, 97, (20,))]
    expected = [model.model(input_ids=row[None]).last_hidden_state[0] for row in ids]
    assert llama_like(model)
    decoder = LlamaDecoder(model)
    cache = KVCache(model.config, 1, 2, 32, torch.float32, "cpu")
    found: list[list[torch.Tensor]] = [[], []]

    def feed(left: int, right: int, chunks: list[tuple[int, int, int]]) -> None:
        """Rows (text, from, to) of one step."""
        size = chunks[0][2] - chunks[0][1]
        cache.begin(left, right, [start for _, start, _ in chunks], size)
        tokens = torch.stack([ids[text][start:stop] for text, start, stop in chunks])
        for (text, _, _), state in zip(chunks, decoder.forward(cache, tokens, (left, right), None), strict=True):
            found[text] += list(state)

    feed(0, 1, [(1, 0, 7)])
    feed(0, 1, [(1, 7, 12)])
    feed(1, 0, [(0, 0, 5)])
    for step in range(5):
        feed(1, 1, [(0, 5 + step, 6 + step), (1, 12 + step, 13 + step)])
    feed(1, 1, [(0, 10, 13), (1, 17, 20)])  # several tokens of rows of different lengths

    for text in (0, 1):
        states = torch.stack(found[text])
        torch.testing.assert_close(states, expected[text][: len(states)], atol=2e-5, rtol=1e-4)


def test_what_is_not_llama_like_is_left_to_transformers() -> None:
    assert not llama_like(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)))
    assert not llama_like(LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")))


@torch.inference_mode()
def test_transformers_own_forward_over_our_cache_says_the_same(world, monkeypatch) -> None:
    ours = states_of(load_members(MembersSpec(**world.members("lora"))), texts=True)

    monkeypatch.setattr(load_module, "llama_like", lambda model: False)
    theirs = states_of(load_members(MembersSpec(**world.members("lora"))), texts=True)

    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def late(world, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Two experts that adapt the upper of the base's two layers only."""
    root = tmp_path_factory.mktemp("late")
    for seed, name in ((2, "creative"), (3, "factual")):
        torch.manual_seed(seed)
        model = add_lora(load_model(world.base), Lora(rank=8, layers="upper third"))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    assert ".layers.1." in key
                    weight.normal_(std=0.1)
        save_model(model, tokenizer, root / name, base=world.base)
    return {"creative": str(root / "creative"), "factual": str(root / "factual")}


def states_of(members: Members, *, texts: bool) -> list[torch.Tensor]:
    """All states of a few steps: two texts on both sides between which stands one that is the creative side's alone."""
    caches = members.caches(4, 32)
    names = {"creative": (13, 12, 11), "factual": (11, 13)}  # a creative feed's first row is the outermost
    rows = {"creative": {11: 0, 12: 1, 13: 2}, "factual": {11: 0, 13: 1}}
    prompts = {11: [5, 6, 7, 8], 12: [9, 10], 13: [11, 12, 13]}
    found = []
    scratch = members.caches(1, 32)
    for text, prompt in prompts.items():
        feed = Feed((prompt,), (0,))
        both = text != 12
        states = members.forward(scratch, (feed, feed if both else NOTHING))
        found += [state for state in states if state is not None]
        caches.copy(scratch, CREATIVE, 0, rows["creative"][text], len(prompt))
        if both:
            caches.copy(scratch, FACTUAL, 0, rows["factual"][text], len(prompt))
    for step in range(3):
        feeds = [
            Feed(
                [[20 + name + step] for name in side],
                [len(prompts[name]) + step for name in side],
                side if texts else (),
            )
            for side in names.values()
        ]
        found += [state for state in members.forward(caches, (feeds[0], feeds[1])) if state is not None]
    return found


@torch.inference_mode()
def test_lower_layers_run_once_for_both_experts_and_change_no_number(late, monkeypatch) -> None:
    members = load_members(MembersSpec(**late))
    rows: list[int] = []
    decoder = members.stacks[0].decoder
    assert isinstance(decoder, LlamaDecoder)
    lowest = decoder._layers[0]
    monkeypatch.setattr(type(lowest.gate_up), "__call__", counted(type(lowest.gate_up).__call__, lowest.gate_up, rows))

    once = states_of(members, texts=True)
    counts = rows[:]
    rows.clear()
    apart = states_of(members, texts=False)

    assert counts == [4, 2, 3, 3, 3, 3]  # tokens of the three prompts, then texts, not rows, of every step
    assert rows == [4, 2, 3, 5, 5, 5]  # (the same feed on both sides of a prompt is known to be one text)
    for mine, other in zip(once, apart, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def counted(call, only, rows):
    def run(self, x):
        if self is only:
            rows.append(len(x))
        return call(self, x)

    return run


@pytest.mark.parametrize("dial", [0.0, 1.0])
def test_ends_of_the_dial_hold_with_late_adapters_in_a_mixed_batch(late, dial, ask, tokenizer, spec_of_members) -> None:
    prompts = [tuple(tokenizer.encode(text)) for text in ("狐狸在河", "The fox", "Rain falls on the", "月亮")]
    engine = build_engine(spec_of_members(late))
    engine.start()
    expert = load_model(late["factual" if dial == 0 else "creative"]).eval()
    try:
        asked = [
            Request(prompt, max_tokens=12, dial=one, temperature=0.0)
            for prompt, one in zip(prompts, (0.4, dial, 1 - dial, 0.6), strict=True)
        ]

        answer = ask(engine, *asked)[1]
    finally:
        engine.stop(timeout_s=10)

    ids = list(prompts[1])
    for token in answer.tokens:
        with torch.inference_mode():
            logprobs = torch.log_softmax(expert(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        assert token.token_id == int(logprobs.argmax())
        assert token.logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
        ids.append(token.token_id)


def test_twins_are_found_by_their_text() -> None:
    finder = TwinFinder("cpu")

    found = finder.find((13, 12, 11), (11, 13))

    assert found is not None
    assert found.keep_U.tolist() == [1, 3, 4]
    assert found.take_R.tolist() == [2, 0, 1, 1, 2]
    assert found.runs == ((1, 2), (3, 5))
    assert finder.find((13, 12, 11), (11, 13)) is found
    assert finder.find((1, 2), (3,)) is None


@pytest.mark.parametrize("with_heads", [False, True])
@torch.inference_mode()
def test_one_output_product_is_the_mixture_of_two(with_heads, world, heads) -> None:
    members = load_members(MembersSpec(**world.members("lora")))
    folder = heads(0.3, -0.2, hidden=4)
    about = json.loads((folder / "heads.json").read_text())
    (folder / "heads.json").write_text(json.dumps(about | {"p_dev": {"temperature": 1.7, "bias": -0.4}}))
    own = load_heads(folder, members.hashes, members.width) if with_heads else None
    spec = DialSpec()
    torch.manual_seed(0)
    creative_Cd, factual_Fd = torch.randn(3, members.width), torch.randn(3, members.width)
    rows = ([1, 0, None, 2], [0, None, 1, 2])
    plan = Plan([0.3, 1.0, 0.0, 0.8], [None] * 4, [1.0] * 4, rows)
    surprise_R = torch.rand(4)
    assert members.shares_output

    mixed = Mixture(members, own, spec).next(creative_Cd, factual_Fd, surprise_R, plan)

    creative_Rd, factual_Rd = (
        torch.stack([states[row or 0] for row in side])
        for states, side in zip((creative_Cd, factual_Fd), rows, strict=True)
    )
    creative_RV = members.log_probabilities(CREATIVE, creative_Rd)
    factual_RV = members.log_probabilities(FACTUAL, factual_Rd)
    two_RV = mix(creative_RV, factual_RV, mixed.w_R, spec)
    ids_R = torch.tensor([5, 6, 7, 8])
    torch.testing.assert_close(mixed.logprobs_RV, two_RV, atol=1e-5, rtol=0)
    expected_RV = factual_RV if with_heads else two_RV
    torch.testing.assert_close(mixed.expected(ids_R), expected_RV.gather(1, ids_R[:, None])[:, 0], atol=1e-5, rtol=0)
    if own is not None:
        p_dev_R = own.p_dev(torch.cat([factual_Rd, surprise_R[:, None]], dim=1))
        torch.testing.assert_close(mixed.p_div_R[[0, 1, 3]], own.p_div(creative_Rd)[[0, 1, 3]])
        torch.testing.assert_close(mixed.p_dev_R[[0, 2, 3]], p_dev_R[[0, 2, 3]])
        assert mixed.p_div_R.isnan().tolist() == [False, False, True, False]
        assert mixed.p_dev_R.isnan().tolist() == [False, True, False, False]


@torch.inference_mode()
def test_an_expert_that_adapts_the_output_matrix_keeps_its_own(world, tmp_path: Path) -> None:
    folder = shutil.copytree(world.creative, tmp_path / "creative")
    about = json.loads((folder / "tiger.json").read_text())
    (folder / "tiger.json").write_text(json.dumps(about | {"base": str(world.base)}))
    tensors = load_file(folder / "adapter_model.safetensors")
    vocabulary, width = load_model(world.base).lm_head.weight.shape
    a_ri, b_or = torch.randn(8, width) * 0.1, torch.randn(vocabulary, 8) * 0.1
    tensors |= {f"base_model.model.lm_head.lora_{k}.weight": v for k, v in (("A", a_ri), ("B", b_or))}
    save_file(tensors, folder / "adapter_model.safetensors")
    scale = 32.0 / 8

    members = load_members(MembersSpec(creative=str(folder), factual=str(world.factual)))

    state_1d = torch.randn(1, width)
    head_Vd = load_model(world.base).lm_head.weight
    assert not members.shares_output
    torch.testing.assert_close(members.logits(FACTUAL, state_1d), state_1d @ head_Vd.T, atol=1e-4, rtol=1e-4)
    own_1V = state_1d @ (head_Vd + scale * b_or @ a_ri).T
    torch.testing.assert_close(members.logits(CREATIVE, state_1d), own_1V, atol=1e-4, rtol=1e-4)


def test_int8_of_a_gpu_is_refused_in_one_line(world) -> None:
    with pytest.raises(ModelError, match="int8 is for CPUs"):
        load_members(MembersSpec(**world.members("lora"), dtype="int8"), "cuda")
