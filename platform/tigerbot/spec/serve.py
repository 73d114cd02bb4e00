"""`kind: serve`: members, dial, judge, engine and endpoint of an ensemble."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tigerbot.spec.access import AccessSpec
from tigerbot.spec.parts import Count, Job, Part, Real, Unit
from tigerbot.spec.plugins import PluginSpec
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
    """When an answer is rewritten: its length-free p_dev score above `threshold`, kept if better by `margin`.

    Evidence reaches a rewrite as quotations in its prompt, as a pull of `pull` nats towards the quoted words, or both.
    A model that was not taught to read quotations wants `pull`.
    """

    threshold: Unit = 0.5
    margin: Unit = 0.05
    max_rewrites: Annotated[int, Field(ge=0, le=2)] = 1
    off_above_dial: Unit = 0.7
    evidence: Literal["prompt", "pull", "both"] = "both"
    pull: Annotated[Real, Field(ge=0, le=20)] = 5.0
    evidence_characters: Annotated[Count, Field(le=20_000)] = 1500


class MembersSpec(Part):
    """Model or adapter folders. Two experts over one base, two full models, or one model alone."""

    base: str | None = None
    creative: str
    factual: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    # float32 keeps the dial's ends within 1e-5 of the single models; auto is float32 on CPU. int8 is for CPUs: the
    # layers' weights by output channel, activations by row; heads are refitted for it (`dtype` of their spec).
    devices: tuple[str, str] | None = None  # of two full models, the creative one's first

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
    keys_file: str | None = None  # made by `tiger keys new`; read again when it changes
    request_timeout_s: Annotated[Real, Field(gt=0)] = 120.0


class SlowClients(Part):
    """How long a client may take to send a request's head, its body, and to take a piece of a stream.

    `header_timeout_s` is kept by the processes that listen, from when their Ray is started.
    """

    header_timeout_s: Annotated[Real, Field(gt=0)] = 30.0
    body_timeout_s: Annotated[Real, Field(gt=0)] = 30.0
    write_timeout_s: Annotated[Real, Field(gt=0)] = 30.0


class EmbeddingSpec(Part):
    """What one request for embeddings may hold."""

    max_inputs: Count = 256
    max_tokens: Count = 32_768


class GateSpec(Part):
    """When the second member's pass is left out. Exact with `mix: linear`; else its measured error is within `eps`."""

    eps: Unit = 0.02
    min_run: Count | None = None
    # Expected run of skipped tokens at which skipping begins: 3, and 12 where two adapters of one base are one batch.
    max_debt: Count = 32


class SpeculateSpec(Part):
    """One member drafts `tokens`, the other verifies them in one pass, while few sequences decode. Exact."""

    tokens: Annotated[Count, Field(le=16)] = 4
    max_sequences: Annotated[Count, Field(le=4)] = 2


class VllmSpec(Part):
    """vLLM in place of our own engine, for one model alone and where it is installed: `engine: {vllm: {}}`.

    `slots`, `max_length`, `max_queue` and `prefill_chunk` hold for it too; whether earlier text is kept follows
    `prefix_cache_bytes`, how much is kept follows from here.
    """

    kv_cache_bytes: Count | None = None  # auto: on a CPU what the slots need, on a GPU what `gpu_memory` leaves
    gpu_memory: Annotated[Real, Field(gt=0, le=1)] = 0.9  # share of each GPU, for weights, keys and values
    compiled: bool = True  # with torch.compile and CUDA graphs; without them it starts sooner


class EngineSpec(Part):
    slots: Annotated[Count, Field(le=1024)] = 16
    max_length: Count = 512
    max_queue: Count = 256
    prefill_chunk: Count = 256
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 128_000_000
    # Keys and values of earlier text, of each tenant's own; 0 reads every prompt anew.
    gate: GateSpec | None = None
    speculate: SpeculateSpec | None = None
    public_prefix: str | None = None  # a system message that all tenants' prompts may share
    vllm: VllmSpec | None = None


class GrammarSpec(Part):
    """What `response_format` and tools may ask for: the largest schema, and how many compiled ones are kept."""

    max_schema_bytes: Count = 65_536
    max_depth: Annotated[Count, Field(le=64)] = 24
    cached: Count = 64


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
    grammar: GrammarSpec = GrammarSpec()
    http: HttpSpec = HttpSpec()
    access: AccessSpec = AccessSpec()
    embedding: EmbeddingSpec = EmbeddingSpec()
    slow_clients: SlowClients = SlowClients()
    scale: ServeScale = ServeScale()
    plugins: list[PluginSpec] = []

    @field_validator("plugins")
    @classmethod
    def _each_once(cls, plugins: list[PluginSpec]) -> list[PluginSpec]:
        names = [plugin.name for plugin in plugins]
        if len(set(names)) < len(names):
            raise ValueError(f"wants each plug-in once; got {', '.join(names)}")
        return plugins
