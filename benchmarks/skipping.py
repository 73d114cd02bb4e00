"""Work left out: two full models gated and speculative against both stepped plainly, and a known prefix against none.

Random weights with a sharp output matrix, and experts that are small changes of one base: like trained ones they agree
at most tokens. How often is printed with each row, for the gain depends on it: with a skipped share s of tokens the
second model's passes become 1 - s and the best possible ratio is 2 / (2 - s); with a share a of drafts that stay, g
drafts cost g passes of one model and one of the other. Everything takes turns in every round.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, bootstrap
from tigerbot.models import add_lora, build, load_model, load_tokenizer, save_model
from tigerbot.spec import Lora, ServeSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request, TokenEvent
from tigerbot_serve.ensemble.build import build_engine

PRESET, PROMPT, SHARED, NEW, ROUNDS, THREADS = "60m", 32, 256, 96, 5, 2
DIAL = 0.2
SHARP = 20.0  # logits of fresh weights times this: the best token has most of the probability, as in a trained model


def main() -> list[Row]:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_models(folder)
        return [*_decoding_rows(folder), *_prefix_rows(folder)]


def _decoding_rows(folder: Path) -> list[Row]:
    engines = {
        "plain": _engine(folder, {}),
        "gated": _engine(folder, {"gate": {}}),
        "speculative": _engine(folder, {"speculate": {"tokens": 4}}),
    }
    alone = _engine(folder, {}, alone=True)
    rows = []
    try:
        for batch in (1, 2):
            runs: dict[str, Callable[[], float]] = {
                name: lambda engine=engine: _decode(engine, batch)  # noqa: B023
                for name, engine in engines.items()
            }
            found = _turns(runs | {"alone": lambda: _decode(alone, batch)})  # noqa: B023
            for name in ("gated", "speculative"):
                note = _shares(engines[name])
                rows.append(
                    _row(f"two full models {name} / plain, batch {batch}, tokens/s", found, name, "plain", note)
                )
            rows.append(_row(f"two full models gated / one model, batch {batch}, tokens/s", found, "gated", "alone"))
    finally:
        for engine in (*engines.values(), alone):
            engine.stop()
    return rows


def _prefix_rows(folder: Path) -> list[Row]:
    engines = {"reused": _engine(folder, {}), "anew": _engine(folder, {"prefix_cache_bytes": 0})}
    calls = iter(range(10**6))
    try:
        found = _turns(
            {name: lambda engine=engine: _first_token_ms(engine, next(calls)) for name, engine in engines.items()}
        )
    finally:
        for engine in engines.values():
            engine.stop()
    measure = f"time to first token after a known prefix of {SHARED} tokens / read anew, ms"
    return [_row(measure, found, "reused", "anew", f"{PROMPT} tokens of the prompt are new", better="lower")]


def _turns(runs: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm: the first call allocates, and the first prefix is read
    for turn in range(ROUNDS):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            found[name].append(runs[name]())
    print(f"  { ({name: round(statistics.median(values), 1) for name, values in found.items()}) }", flush=True)
    return found


def _row(
    measure: str, found: dict[str, list[float]], ours: str, stock: str, note: str = "", better: str = "higher"
) -> Row:
    ratios = [a / b for a, b in zip(found[ours], found[stock], strict=True)]
    low, high = bootstrap(ratios)
    medians = [f"{statistics.median(found[name]):.4g}" for name in (ours, stock)]
    return Row(measure, statistics.median(ratios), low, high, better, "report", ROUNDS, *medians, note)


def _shares(engine: Engine) -> str:
    stats = engine.stats()
    if stats.tokens_drafted:
        return f"{stats.drafts_kept / stats.tokens_drafted:.0%} of drafted tokens stayed"
    share = stats.tokens_gated / max(1, stats.tokens_decoded)
    return f"{share:.0%} of tokens skipped; at most {2 / (2 - share):.2f}"


def _write_models(folder: Path) -> None:
    train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build(PRESET, 4096, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[:80].zero_()  # never the end token, where the matrix is shared
        model.lm_head.weight.mul_(SHARP)
        model.lm_head.weight[:80].zero_()
    save_model(model, tokenizer, folder / "base")
    for seed, name in ((1, "creative"), (2, "factual")):
        torch.manual_seed(seed)
        expert: Any = add_lora(load_model(folder / "base"), Lora(rank=16))
        with torch.no_grad():
            for key, weight in expert.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.002)
        save_model(expert.merge_and_unload(), tokenizer, folder / name)


def _engine(folder: Path, engine: dict[str, Any], *, alone: bool = False) -> Engine:
    members = {"creative": str(folder / "creative")} | ({} if alone else {"factual": str(folder / "factual")})
    raw = {
        "kind": "serve",
        "name": "b",
        "members": members,
        "dial": {"mix": "linear"},
        "scale": {"threads": THREADS},
        "engine": {"max_length": 512, "slots": 4, "prefix_cache_bytes": 200_000_000} | engine,
    }
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    built = build_engine(spec)
    built.start()
    return built


def _decode(engine: Engine, batch: int) -> float:
    async def one(seed: int) -> int:
        ids = tuple(100 + (index * 7 + seed) % 400 for index in range(PROMPT))
        request = Request(ids, NEW, DIAL, temperature=1.0, seed=seed)
        async for event in engine.submit(request, asyncio.get_running_loop()):
            if isinstance(event, FinishEvent):
                return event.usage.completion_tokens
        return 0

    async def together() -> int:
        return sum(await asyncio.gather(*(one(seed) for seed in range(batch))))

    began = time.perf_counter()
    tokens = asyncio.run(together())
    return tokens / (time.perf_counter() - began)


def _first_token_ms(engine: Engine, call: int) -> float:
    shared = tuple(100 + index * 3 % 400 for index in range(SHARED))
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
