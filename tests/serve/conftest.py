"""Small real folders for the engine's tests: a base, two LoRA experts on it with weights that matter, their heads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tigerbot.models import add_lora, build, load_model, load_tokenizer, model_hash, save_model, tokenizer_hash
from tigerbot.spec import Lora, ServeSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import Event, FinishEvent, Request, TokenEvent
from tigerbot_serve.ensemble.build import build_engine

LINES = [
    "The fox sings in the river at night.",
    "狐狸在河边唱歌。",
    "Rain falls on the old town.",
    "细雨落下，月亮等待。",
] * 20


@dataclass(frozen=True)
class World:
    """Folders of one tokenizer: a base, two experts on it, and both experts merged into full models."""

    base: Path
    creative: Path
    factual: Path
    creative_full: Path
    factual_full: Path

    def members(self, kind: str) -> dict[str, str]:
        return {
            "lora": {"creative": str(self.creative), "factual": str(self.factual)},
            "full": {"creative": str(self.creative_full), "factual": str(self.factual_full)},
            "alike": {"creative": str(self.creative_full), "factual": str(self.creative_full)},
            "alone": {"creative": str(self.creative)},
        }[kind]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    train_tokenizer(LINES, 600, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    model = build("tiny", len(tokenizer), seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # sharper than fresh weights, so that greedy choices are no near-ties
        model.lm_head.weight[: tokenizer.convert_tokens_to_ids("<|end|>") + 65].mul_(0.05)  # words, not special tokens
    save_model(model, tokenizer, root / "base")
    for seed, name, alpha in ((2, "creative", 32.0), (3, "factual", 16.0)):
        _expert(root, name, seed, alpha, tokenizer)
    return World(root / "base", *(root / name for name in ("creative", "factual", "creative_full", "factual_full")))


def _expert(root: Path, name: str, seed: int, alpha: float, tokenizer: Any) -> None:
    torch.manual_seed(seed)
    model = add_lora(load_model(root / "base"), Lora(rank=8, alpha=alpha))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.1)
    save_model(model, tokenizer, root / name, base=root / "base")
    save_model(model.merge_and_unload(), tokenizer, root / f"{name}_full")


@pytest.fixture(scope="session")
def tokenizer(world: World) -> Any:
    return load_tokenizer(world.base)


@pytest.fixture
def heads(world: World, tmp_path: Path) -> Callable[..., Path]:
    """A heads folder for the LoRA experts: linear heads of given weights (257 for p_dev), or given constants."""

    def write(
        p_div: float = 0.0, p_dev: float = 0.0, *, w_dev: torch.Tensor | None = None, hidden: int = 0, **changes: Any
    ) -> Path:
        folder = tmp_path / f"heads-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        size = 256
        tensors = {}
        for name, bias, width in (("p_div", p_div, size), ("p_dev", p_dev, size + 1)):
            tensors[f"{name}.w2"] = torch.zeros(1, hidden or width)
            tensors[f"{name}.b2"] = torch.tensor([bias])
            if hidden:
                tensors[f"{name}.w1"] = torch.randn(hidden, width)
                tensors[f"{name}.b1"] = torch.zeros(hidden)
                tensors[f"{name}.w2"] = torch.randn(1, hidden) * 0.1
        if w_dev is not None:
            tensors["p_dev.w2"] = w_dev.reshape(1, size + 1)
        save_file(tensors, folder / "heads.safetensors")
        about = {
            "format_version": 2,
            "layer": -1,
            "hidden": hidden,
            "size": size,
            "p_div": {"temperature": 1.0, "bias": 0.0},
            "p_dev": {"temperature": 1.0, "bias": 0.0},
            "creative_hash": model_hash(world.creative),
            "factual_hash": model_hash(world.factual),
            "tokenizer_hash": tokenizer_hash(world.base),
            "metrics": {},
        }
        (folder / "heads.json").write_text(json.dumps(about | changes))
        return folder

    return write


def serve_spec(members: dict[str, str], **fields: Any) -> ServeSpec:
    raw = {"kind": "serve", "name": "s", "members": members, "engine": {"max_length": 128}, "scale": {"threads": 1}}
    spec = parse_spec(raw | fields)
    assert isinstance(spec, ServeSpec)
    return spec


@pytest.fixture
def spec_of_members() -> Callable[..., ServeSpec]:
    return serve_spec


@pytest.fixture
def engine_of(world: World) -> Iterator[Callable[..., Engine]]:
    """Engines that run for one test: `engine_of("lora", heads=..., dial={...})`."""
    engines: list[Engine] = []

    def make(kind: str = "lora", *, start: bool = True, **fields: Any) -> Engine:
        engine = build_engine(serve_spec(world.members(kind), **fields))
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop(timeout_s=10)


@dataclass(frozen=True)
class Answer:
    events: list[Event]

    @property
    def tokens(self) -> list[TokenEvent]:
        return [event for event in self.events if isinstance(event, TokenEvent)]

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def end(self) -> FinishEvent:
        assert isinstance(self.events[-1], FinishEvent)
        return self.events[-1]


@pytest.fixture
def ask() -> Callable[..., list[Answer]]:
    """Decode requests together and give their answers in order."""

    def run(engine: Engine, *requests: Request) -> list[Answer]:
        async def one(request: Request) -> Answer:
            return Answer([event async for event in engine.submit(request, asyncio.get_running_loop())])

        async def together() -> list[Answer]:
            return list(await asyncio.wait_for(asyncio.gather(*map(one, requests)), 60))

        return asyncio.run(together())

    return run
