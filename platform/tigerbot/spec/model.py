"""Where weights come from, and the adapter that may stand on them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tigerbot.spec.parts import Count, Part, Real, Unit


class ModelSource(Part):
    """Where weights come from: exactly one of the four, and the tokenizer's folder where it is elsewhere.

    `weights` is a DeepSpeed checkpoint whose float32 masters replace the weights of that one.
    """

    preset: str | None = None
    path: str | None = None
    hub: str | None = None
    gguf: str | None = None
    weights: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        given = [name for name in ("preset", "path", "hub", "gguf") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"wants exactly one of preset, path, hub, gguf; got {', '.join(given) or 'none'}")
        return self


class Lora(Part):
    """A peft LoRA adapter. `layers` limits it to the last n decoder layers, or to the upper third (all when absent).

    What two experts leave alone below, an ensemble of them computes once.
    """

    rank: Count = 16
    alpha: Real = 32.0
    dropout: Unit = 0.0
    layers: Count | Literal["upper third"] | None = None
