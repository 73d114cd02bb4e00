"""`kind: serve`: members, dial, judge, engine and endpoint of an ensemble."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Job, Part, Real, Unit
from tigerbot.spec.scale import ServeScale


class DialSpec(Part):
    """`w_t = sigmoid(logit(dial) + a logit(p_div) - b logit(p_dev))`, temperature tied to w."""

    a: Annotated[Real, Field(ge=0)] = 0.3
    b: Annotated[Real, Field(ge=0)] = 0.3
    mix: Literal["geometric", "linear"] = "geometric"
    temperature_factual: Annotated[Real, Field(ge=0, le=2)] = 0.3
    temperature_creative: Annotated[Real, Field(ge=0, le=2)] = 1.0
    plausibility: Unit = 0.05
    default: Unit = 0.3


class JudgeSpec(Part):
    """When an answer is rewritten: its length-free p_dev score above `threshold`, kept if better by `margin`."""

    threshold: Unit = 0.5
    margin: Unit = 0.05
    max_rewrites: Annotated[int, Field(ge=0, le=2)] = 1
    off_above_dial: Unit = 0.7


class MembersSpec(Part):
    """Model or adapter folders. Two experts over one base, two full models, or one model alone."""

    base: str | None = None
    creative: str
    factual: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    devices: tuple[str, str] | None = None  # of two full models, the creative one's first
    # float32 keeps the dial's ends within 1e-5 of the single models; auto is float32 on CPU.

    @model_validator(mode="after")
    def _two_to_place(self) -> MembersSpec:
        if self.devices is not None and (self.factual is None or self.base is not None):
            raise ValueError("devices wants two full models: members.creative and members.factual, and no base")
        return self


class CanarySpec(Part):
    """Other members for a share of the callers, beside the rest in every replica, taken back when they do worse.

    A caller stays on one side: the side is a hash of who asks. Nothing is judged before `min_answers` on each side.
    """

    members: MembersSpec
    heads: str | None = None
    percent: Annotated[Real, Field(gt=0, le=50)] = 10.0
    salt: str = ""
    min_answers: Count = 200
    slower: Annotated[Real, Field(ge=1)] = 1.25  # than the others' p99, times this, an answer is called slow


class HttpSpec(Part):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    max_body_bytes: Count = 1_000_000
    max_messages: Count = 256
    api_keys_env: str = "TIGER_API_KEYS"
    request_timeout_s: Annotated[Real, Field(gt=0)] = 120.0


class EngineSpec(Part):
    slots: Annotated[Count, Field(le=1024)] = 16
    max_length: Count = 512
    max_queue: Count = 256
    prefill_chunk: Count = 256


class ServeSpec(Job):
    """An ensemble behind one OpenAI-compatible endpoint."""

    kind: Literal["serve"]
    model_name: str = "tiger"
    members: MembersSpec
    heads: str | None = None
    canary: CanarySpec | None = None
    follow: bool = False  # serve the model an alias is moved to, when it moves
    dial: DialSpec = DialSpec()
    judge: JudgeSpec = JudgeSpec()
    engine: EngineSpec = EngineSpec()
    http: HttpSpec = HttpSpec()
    scale: ServeScale = ServeScale()
