"""What the decoding benchmarks share: models with random weights, engines over them, and how fast these decode.

Random weights: the work of a step does not depend on what the weights say. How much work the gate and the drafts leave
out does: for them weights can be sharp, so that like a trained model's the best token has most of the probability.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import Row, bootstrap
from tigerbot.models import add_lora, build, load_model, load_tokenizer, model_hash, save_model, tokenizer_hash
from tigerbot.spec import Lora, ServeSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import EngineStats, FinishEvent, Request
from tigerbot_serve.ensemble.build import build_engine

PROMPT, NEW, ROUNDS, THREADS = 32, 96, 5, 2
SHARP = 10.0  # times the logits of fresh weights
VOCABULARY = {"tiny": 4096, "60m": 32_000}
IDS = [100 + index % 400 for index in range(PROMPT)]


def write_base(preset: str, folder: Path, *, sharp: float = 1.0) -> None:
    """A base of a preset with random weights, in `folder`/base; its logits are `sharp` times those of fresh weights."""
    train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, folder / "tokenizer")
    model: Any = build(preset, VOCABULARY[preset], 1)
    with torch.no_grad():  # never the end token: every answer has its full length
        model.get_input_embeddings().weight[:80].zero_()
        model.model.norm.weight.mul_(sharp)
    save_model(model, load_tokenizer(folder / "tokenizer"), folder / "base")


def write_pair(folder: Path, name: str, lora: Lora, *, merged: bool = False, spread: float = 0.01) -> dict[str, str]:
    """Two experts on the base, as the members of a spec; merged, they are two full models. `spread` is of their B."""
    members = {}
    for seed, role in ((1, "creative"), (2, "factual")):
        torch.manual_seed(seed)
        expert = add_lora(load_model(folder / "base"), lora)
        with torch.no_grad():
            for key, weight in expert.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=spread)
        to, tokenizer = folder / f"{name}-{role}", load_tokenizer(folder / "tokenizer")
        if merged:
            save_model(expert.merge_and_unload(), tokenizer, to)
        else:
            save_model(expert, tokenizer, to, base=folder / "base")
        members[role] = str(to)
    return members


def write_models(preset: str, folder: Path) -> dict[str, str]:
    """A base and two LoRA experts on it, as the members of a spec."""
    write_base(preset, folder)
    return write_pair(folder, "lora", Lora())


def write_heads(folder: Path, members: Mapping[str, str], width: int, hidden: int = 64) -> str:
    """Heads of the usual size with random weights."""
    folder.mkdir()
    tensors = {}
    for name, size in (("p_div", width), ("p_dev", width + 1)):
        tensors |= {f"{name}.w1": torch.randn(hidden, size) * 0.02, f"{name}.b1": torch.zeros(hidden)}
        tensors |= {f"{name}.w2": torch.randn(1, hidden) * 0.02, f"{name}.b2": torch.zeros(1)}
    save_file(tensors, folder / "heads.safetensors")
    about = {"format_version": 2, "layer": -1, "hidden": hidden, "size": width}
    about |= {f"{role}_hash": model_hash(path) for role, path in members.items()}
    about |= {"tokenizer_hash": tokenizer_hash(members["creative"])}
    (folder / "heads.json").write_text(json.dumps(about))
    return str(folder)


def engine_of(
    members: Mapping[str, str],
    *,
    dtype: str = "float32",
    heads: str | None = None,
    dial: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Engine:
    """A running engine over members; `dial` and `engine` are of the spec."""
    raw = {
        "kind": "serve",
        "name": "b",
        "members": dict(members) | {"dtype": dtype},
        "heads": heads,
        "scale": {"threads": THREADS},
        "dial": dict(dial or {}),
        "engine": {"max_length": 160} | dict(engine or {}),
    }
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    built = build_engine(spec)
    built.start()
    return built


def decode(engine: Engine, batch: int, *, new: int = NEW, temperature: float = 1.0, dial: float = 0.5) -> float:
    """Tokens a second of `batch` requests at once, all of the same length."""

    async def one(seed: int) -> int:
        request = Request(tuple(IDS), new, dial, temperature=temperature, seed=seed)
        async for event in engine.submit(request, asyncio.get_running_loop()):
            if isinstance(event, FinishEvent):
                return event.usage.completion_tokens
        return 0

    async def together() -> int:
        return sum(await asyncio.gather(*(one(seed) for seed in range(batch))))

    began = time.perf_counter()
    tokens = asyncio.run(together())
    return tokens / (time.perf_counter() - began)


def in_turn(sides: Mapping[str, Callable[[], float]], label: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Every side once a round, in turn, the other way round in every second round; a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in list(sides.items())[:: 1 if turn % 2 else -1]:
            speed = run()
            if turn:
                found[name].append(speed)
    print(f"  {label}: { {name: round(statistics.median(speeds), 1) for name, speeds in found.items()} }", flush=True)
    return found


def ratio_row(
    measure: str, found: Mapping[str, list[float]], ours: str, stock: str, target: str, *, note: str = ""
) -> Row:
    """Ours / stock over the rounds, tokens a second, with the 95 % interval of the median."""
    ratios = [a / b for a, b in zip(found[ours], found[stock], strict=True)]
    low, high = bootstrap(ratios)
    said = {name: f"{statistics.median(found[name]):.0f} tokens/s" for name in (ours, stock)}
    value = statistics.median(ratios)
    return Row(f"{measure}, tokens/s", value, low, high, "higher", target, len(ratios), said[ours], said[stock], note)


def left_out(engine: Engine, before: EngineStats) -> str:
    """What a gate or drafts have saved since `before`, as a row's note."""
    now = engine.stats()
    if drafted := now.tokens_drafted - before.tokens_drafted:
        return f"{(now.drafts_kept - before.drafts_kept) / drafted:.0%} of drafted tokens stayed"
    share = (now.tokens_gated - before.tokens_gated) / max(1, now.tokens_decoded - before.tokens_decoded)
    return f"{share:.0%} of tokens skipped"


def stop(engines: Mapping[str, Any]) -> None:
    for engine in engines.values():
        engine.stop()
