"""Where a learning rate should be looked for, before anything is run: two published rules, printed with their sources.

A rule is advice, not a bound: it says what it was fitted on, and whether this model lies inside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.spec import SweepSpec, TrainSpec

LR = "train.lr"


@dataclass(frozen=True)
class Size:
    """Of a model: its width, and its parameters without embeddings and output head."""

    width: int
    parameters: int


def step_law(parameters: int, tokens: int) -> tuple[float, float]:
    """Step Law (arXiv 2503.04715, 3,700 models of 60M to 1B): the learning rate, and the tokens of a batch."""
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def mup_transfer(lr: float, width: int, to_width: int) -> float:
    """muTransfer (arXiv 2203.03466) under Adam: what was best for the hidden matrices goes with one over the width."""
    return lr * width / to_width


def size_of(spec: TrainSpec) -> Size | None:
    """Of a preset or a folder with a Hugging Face config; None where neither says."""
    from tigerbot.models import preset_config

    if spec.model.preset:
        config: dict[str, Any] = preset_config(spec.model.preset, 512).to_dict()
    elif spec.model.path and (Path(spec.model.path) / "config.json").exists():
        config = json.loads((Path(spec.model.path) / "config.json").read_text(encoding="utf-8"))
    else:
        return None
    try:
        width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        keys = width * (config.get("num_key_value_heads") or heads) // heads
        layer = 2 * width * width + 2 * width * keys + 3 * width * config["intermediate_size"]
    except KeyError:
        return None
    return Size(width, layers * layer)


def prior_lines(spec: SweepSpec, train: TrainSpec) -> list[str]:
    """What the rules say of this sweep's target; nothing where its learning rate is not looked for."""
    size = size_of(train)
    if LR not in spec.space or size is None:
        return []
    tokens = train.train.tokens
    lr, batch = step_law(size.parameters, tokens)
    outside = "" if 6e7 <= size.parameters <= 1e9 else ", an extrapolation from the fitted 60M-1B"
    lines = [
        f"Step Law (arXiv 2503.04715{outside}): {LR} {lr:.2g}, a batch of {batch:,.0f} tokens, "
        f"for {size.parameters:,} parameters without embeddings and {tokens:,} tokens"
    ]
    lines += [_where(spec.space[LR], lr)]
    known = spec.transfer_from
    if known is not None:
        moved = mup_transfer(known.lr, known.width, size.width)
        what = f"{LR} {known.lr:.2g} at width {known.width} is {moved:.2g} at width {size.width}"
        lines += [f"muTransfer (arXiv 2203.03466; hidden matrices, Adam): {what}", _where(spec.space[LR], moved)]
    return [line for line in lines if line]


def _where(field: dict[str, Any], lr: float) -> str:
    """Whether the space holds an advice."""
    bounds = next((field[kind] for kind in ("log_uniform", "uniform") if kind in field), None)
    if bounds is None:
        return ""
    low, high = (float(bound) for bound in bounds)
    return "" if low <= lr <= high else f"  the space [{low:g}, {high:g}] does not hold {lr:.2g}"
