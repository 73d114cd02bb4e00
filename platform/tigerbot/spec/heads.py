"""`kind: heads` and `kind: eval`: what is trained on two experts, and how their endpoint is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tigerbot.spec.parts import Count, Job, Language, Real, Unit


class HeadsSpec(Job):
    """Train p_div on the creative member and p_dev on the factual member; both are model folders.

    `dtype` is what they will be served in: int8 moves hidden states, so heads belong to one or the other.
    """

    kind: Literal["heads"]
    creative: str
    factual: str
    data: Literal["world"] | str = "world"
    lang: Language | None = None
    layer: int = -1
    hidden: Annotated[int, Field(ge=0, le=1024)] = 64
    facts: Count = 800
    branch_prompts: Count = 60
    continuations: Count = 12
    epochs: Count = 60
    lr: Annotated[Real, Field(gt=0)] = 1e-3
    seed: int = 1
    dtype: Literal["float32", "int8"] = "float32"


class EvalSpec(Job):
    """Ask an endpoint the questions of the closed world at several dials and measure."""

    kind: Literal["eval"]
    url: str
    lang: Language | None = None
    dials: Annotated[list[Unit], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    questions: Count = 200
    creative_prompts: Count = 12
    samples: Count = 8
    seeds: Annotated[list[int], Field(min_length=1)] = [1, 2, 3]
    api_key_env: str = "TIGER_API_KEY"
    concurrency: Count = 16
