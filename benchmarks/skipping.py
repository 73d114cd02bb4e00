"""Work left out: two full models gated and speculative against both stepped plainly, and a known prefix against none.

    python -m benchmarks skipping
    DEMO=tiger-runs/demo python -m benchmarks skipping   # and what the gate skips on the demo's trained experts

Random sharp weights, and experts that are small changes of one base: like trained ones they agree at most tokens. How
often is printed with each row, for the gain depends on it: with a skipped share s of tokens the second model's passes
become 1 - s and the best possible ratio is 2 / (2 - s); with a share a of drafts that stay, g drafts cost g passes of
one model and one of the other. Everything takes turns in every round. The gate over two experts of one base is in
`ensemble_decode`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import (
    PROMPT,
    SHARP,
    THREADS,
    decode,
    engine_of,
    in_turn,
    left_out,
    ratio_row,
    stop,
    write_base,
    write_pair,
)
from benchmarks.harness import Row, bootstrap
from tigerbot.chat import encode_chat
from tigerbot.models import load_model, load_tokenizer, save_model
from tigerbot.spec import Lora
from tigerbot_jobs.data.world import World
from tigerbot_jobs.evaluate.job import creative_prompts
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request, TokenEvent

PRESET, DIAL, SHARED = "60m", 0.2, 256
SPREAD = 0.015  # of the experts' B: their drafts stay at 70 to 90% of places, as trained experts' do
LINEAR = {"mix": "linear"}
DIALS = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> list[Row]:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(PRESET, folder, sharp=SHARP)
        two = write_pair(folder, "two", Lora(rank=16), merged=True, spread=SPREAD)
        rows = [*_decoding_rows(two), *_prefix_rows(two)]
        if demo := os.environ.get("DEMO"):
            rows += _trained_rows(Path(demo), folder)
    return rows


def _decoding_rows(two: Mapping[str, str]) -> list[Row]:
    engines = {
        "plain": engine_of(two, dial=LINEAR),
        "gated": engine_of(two, dial=LINEAR, engine={"gate": {}}),
        "speculative": engine_of(two, dial=LINEAR, engine={"speculate": {"tokens": 4}}),
        "one": engine_of({"creative": two["creative"]}),
    }
    rows = []
    try:
        for batch in (1, 2):
            sides = {name: partial(decode, engine, batch, dial=DIAL) for name, engine in engines.items()}
            before = {name: engine.stats() for name, engine in engines.items()}
            found = in_turn(sides, f"two full models, batch {batch}")
            for ours, stock in (("gated", "plain"), ("speculative", "plain"), ("gated", "one"), ("speculative", "one")):
                label = f"two full models {ours} / {stock}, linear mix, dial {DIAL}, batch {batch}"
                note = left_out(engines[ours], before[ours])
                rows.append(ratio_row(label, found, ours, stock, "report", note=note))
    finally:
        stop(engines)
    return rows


def _prefix_rows(two: Mapping[str, str]) -> list[Row]:
    room = {"max_length": 512, "slots": 4}
    engines = {
        "reused": engine_of(two, engine=room | {"prefix_cache_bytes": 200_000_000}),
        "anew": engine_of(two, engine=room | {"prefix_cache_bytes": 0}),
    }
    calls = count()
    try:
        sides = {name: partial(_first_token_ms, engine, calls) for name, engine in engines.items()}
        found = in_turn(sides, f"first token after {SHARED} + {PROMPT} tokens, ms")
    finally:
        stop(engines)
    ratios = [a / b for a, b in zip(found["reused"], found["anew"], strict=True)]
    low, high = bootstrap(ratios)
    measure = f"time to first token after a known prefix of {SHARED} tokens / read anew"
    ours, stock = (f"{statistics.median(found[name]):.0f} ms" for name in ("reused", "anew"))
    note = f"{PROMPT} tokens of the prompt are new"
    return [Row(measure, statistics.median(ratios), low, high, "lower", "report", len(ratios), ours, stock, note)]


def _first_token_ms(engine: Engine, calls: count) -> float:
    shared = tuple(100 + index * 3 % 400 for index in range(SHARED))
    call = next(calls)
    own = tuple(100 + (index * 5 + call * 13) % 400 for index in range(PROMPT))

    async def first() -> float:
        began = time.perf_counter()
        handle = engine.submit(Request((*shared, *own), 1, DIAL, temperature=0.0), asyncio.get_running_loop())
        took = 0.0
        async for event in handle:
            if isinstance(event, TokenEvent):
                took = time.perf_counter() - began
        return 1000 * took

    return asyncio.run(first())


def _trained_rows(demo: Path, folder: Path) -> list[Row]:
    """What the gate skips with the demo's experts as two full models: they differ more than random ones. No speeds."""
    members = {}
    for role in ("creative", "factual"):
        expert: Any = load_model(demo / role / "model")
        members[role] = str(
            save_model(expert.merge_and_unload(), load_tokenizer(demo / "base" / "model"), folder / f"trained-{role}")
        )
    rows = []
    for mix, kept in (("linear", "exact"), ("geometric", "measured error {:.4f} a token")):
        engine = engine_of(members, dial={"mix": mix}, engine={"gate": {}})
        engine._end_ids = frozenset()  # the demo's answers are shorter than a gate's memory
        try:
            shares = [_skipped(engine, dial) for dial in DIALS]
            told = ", ".join(f"{dial}: {share:.0%}" for dial, share in zip(DIALS, shares, strict=True))
            note = f"by dial {told}; {kept.format(engine.stats().gate_variation)}"
        finally:
            engine.stop()
        measure = f"tokens skipped, the demo's experts as two full models without heads, {mix} mix, mean of dials"
        mean = statistics.mean(shares)
        rows.append(Row(measure, mean, min(shares), max(shares), "higher", "report", len(DIALS), note=note))
    return rows


def _skipped(engine: Engine, dial: float) -> float:
    """The share of skipped tokens in 64 tokens after each of some questions and creative prompts."""
    texts = [one.question for one in World(1).eval_questions(12, seed=1)] + [one.text for one in creative_prompts(4)]
    prompts = [tuple(encode_chat(engine.tokenizer, [{"role": "user", "content": text}])[0]) for text in texts]
    before = engine.stats()

    async def one(seed: int) -> None:
        request = Request(prompts[seed], 64, dial, seed=seed)
        async for event in engine.submit(request, asyncio.get_running_loop()):
            assert not isinstance(event, FinishEvent) or event.finish_reason == "length"

    async def together() -> None:
        await asyncio.gather(*(one(seed) for seed in range(len(prompts))))

    asyncio.run(together())
    after = engine.stats()
    return (after.tokens_gated - before.tokens_gated) / (after.tokens_decoded - before.tokens_decoded)
