"""Tokens a second at batch 1 and 8: one model in our engine, two LoRA experts mixed, and transformers' `generate`.

The three take turns in every round. Random weights: the work of a step does not depend on what they say.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row
from tigerbot.models import add_lora, build, load_model, load_tokenizer, save_model
from tigerbot.spec import Lora, ServeSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.ensemble.build import build_engine

PROMPT, NEW, ROUNDS, THREADS = 32, 96, 5, 2


def main() -> list[Row]:
    torch.set_num_threads(THREADS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for preset in ("tiny", "60m"):
            rows += _preset_rows(preset, Path(name) / preset)
    return rows


def _preset_rows(preset: str, folder: Path) -> list[Row]:
    _write_models(preset, folder)
    ids = [100 + index % 400 for index in range(PROMPT)]
    plain: Any = load_model(folder / "creative").merge_and_unload().eval()
    alone = _engine({"creative": str(folder / "creative")})
    both = _engine({"creative": str(folder / "creative"), "factual": str(folder / "factual")})
    rows = []
    try:
        for batch in (1, 8):
            found: dict[str, list[float]] = {"generate": [], "alone": [], "ensemble": []}
            for _ in range(ROUNDS):
                found["generate"].append(_generate(plain, ids, batch))
                found["alone"].append(_decode(alone, ids, batch))
                found["ensemble"].append(_decode(both, ids, batch))
            print(
                f"  {preset} batch {batch}: { ({k: round(statistics.median(v)) for k, v in found.items()}) }",
                flush=True,
            )
            rows.append(_row(f"two LoRA experts / one model, `{preset}`, batch {batch}", found, "ensemble", "alone"))
            rows.append(
                _row(f"our engine, one model / `generate`, `{preset}`, batch {batch}", found, "alone", "generate")
            )
    finally:
        alone.stop()
        both.stop()
    return rows


def _row(measure: str, found: dict[str, list[float]], ours: str, stock: str) -> Row:
    ratios = [a / b for a, b in zip(found[ours], found[stock], strict=True)]
    medians = {name: f"{statistics.median(values):.0f} tokens/s" for name, values in found.items()}
    return Row(
        f"{measure}, tokens/s",
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        "higher",
        "report",
        ROUNDS,
        medians[ours],
        medians[stock],
    )


def _write_models(preset: str, folder: Path) -> None:
    train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build(preset, 4096, 1)
    with torch.no_grad():  # never the end token: every answer has its full length
        model.get_input_embeddings().weight[:80].zero_()
    save_model(model, tokenizer, folder / "base")
    for seed, name in ((1, "creative"), (2, "factual")):
        torch.manual_seed(seed)
        expert = add_lora(load_model(folder / "base"), Lora(rank=16))
        with torch.no_grad():
            for key, weight in expert.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.01)
        save_model(expert, tokenizer, folder / name, base=folder / "base")


def _engine(members: dict[str, str]) -> Engine:
    raw = {
        "kind": "serve",
        "name": "b",
        "members": members,
        "scale": {"threads": THREADS},
        "engine": {"max_length": 160},
    }
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    engine = build_engine(spec)
    engine.start()
    return engine


def _decode(engine: Engine, ids: list[int], batch: int) -> float:
    async def one(seed: int) -> int:
        request = Request(tuple(ids), NEW, 0.5, temperature=1.0, seed=seed)
        async for event in engine.submit(request, asyncio.get_running_loop()):
            if isinstance(event, FinishEvent):
                return event.usage.completion_tokens
        return 0

    async def together() -> int:
        return sum(await asyncio.gather(*(one(seed) for seed in range(batch))))

    began = time.perf_counter()
    tokens = asyncio.run(together())
    return tokens / (time.perf_counter() - began)


@torch.inference_mode()
def _generate(model: Any, ids: list[int], batch: int) -> float:
    inputs = torch.tensor([ids] * batch)
    began = time.perf_counter()
    out = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return (out.shape[1] - PROMPT) * batch / (time.perf_counter() - began)
