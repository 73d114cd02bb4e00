"""Specs: what a person submits, as YAML, checked before anything starts.

`load_spec(path, overrides)` reads one YAML document, applies `--set a.b=c`, and returns the typed spec of its
`kind`. Every mistake is one `SpecError` line: file and line, field, what it got, what it wants, the nearest valid
name. This module knows nothing about how a spec is run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tigerbot.errors import SpecError

Language = Literal["en", "zh"]  # of the shipped world; both where it is left out
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def _underscored(value: Any) -> Any:
    # YAML reads 5_000_000 as an integer but 1e-3 as a string: accept what people write.
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d_]+(\.\d*)?([eE][+-]?\d+)?", value):
        number = float(value.replace("_", ""))
        return int(number) if number.is_integer() else number
    return value


Count = Annotated[int, BeforeValidator(_underscored), Field(ge=1)]
Real = Annotated[float, BeforeValidator(_underscored)]


class Part(BaseModel):
    """A section of a spec: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(Part):
    uri: str = "./tiger-runs"
    keep: Count = 3


class Tracking(Part):
    """MLflow. `uri` is `sqlite:///file` (a local server is started over it) or `http(s)://server`."""

    uri: str = "sqlite:///tiger-runs/mlflow.db"
    experiment: str = "default"
    parent: str | None = None


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
    """A peft LoRA adapter. `layers` limits it to the last n decoder layers (all when absent)."""

    rank: Count = 16
    alpha: Real = 32.0
    dropout: Unit = 0.0
    layers: Count | None = None


class DataSource(Part):
    """One source of training rows: a text or chat JSONL file (plain, gz, zst), or a folder of token shards."""

    path: str
    format: Literal["text", "chat", "tokens"] = "tokens"
    weight: Annotated[Real, Field(gt=0)] = 1.0


class TrainData(Part):
    train: Annotated[list[DataSource], Field(min_length=1)]
    validation: list[DataSource] = []
    sequence_length: Annotated[Count, Field(le=131_072)] = 512


class TrainLoop(Part):
    """The optimisation. `tokens` is the whole run; `batch_tokens` one optimizer step over all ranks."""

    tokens: Count
    batch_tokens: Count = 32_768
    micro_batch: Count = 8
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: Annotated[Real, Field(gt=0, le=10)] = 3.0e-4
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_fraction: Unit = 0.02
    decay_fraction: Unit = 0.2
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: Annotated[Real, Field(ge=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    validate_every: Count = 50
    log_every: Count = 5
    seed: int = 1


class Scale(Part):
    """How many workers. `[min, max]` is elastic between the two."""

    workers: int | tuple[int, int] = 1
    standbys: int | Literal["auto"] = "auto"
    cpus_per_worker: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[Real, Field(ge=0)] = 0.0
    threads_per_worker: Count | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        low, high = self.bounds
        if not 1 <= low <= high:
            raise ValueError(f"workers wants 1 <= min <= max; got [{low}, {high}]")
        return self


class FaultTolerance(Part):
    """How a run survives. Everything is on by itself.

    `auto`: a snapshot into memory as often as costs 2%, into storage by Young and Daly from measured cost and failures,
    hung ranks by what their phases usually take. `max_failures: -1` goes on as long as there is progress.
    """

    snapshot_every_steps: Count | Literal["auto"] = "auto"
    checkpoint_every_s: Annotated[Real, Field(gt=0)] | Literal["auto"] = "auto"
    checkpoint_every_steps: Count | None = None
    silence_s: Annotated[Real, Field(ge=1)] = 5.0
    max_failures: Annotated[int, Field(ge=-1)] = -1
    price_per_card_hour: Annotated[Real, Field(ge=0)] | None = None
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None


class Islands(Part):
    """Groups of workers that meet every `every` steps at an outer server (DiLoCo), in place of at every step.

    `count` islands share `train.tokens`; each has `scale.workers` workers and its own batches of `batch_tokens`.
    `server`: where the server listens when islands are on several machines; `here`: the islands that this command
    starts (all when absent); `member`: this run is that island. The secret is in TIGER_ISLANDS_SECRET.
    """

    count: Annotated[Count, Field(le=1024)] = 2
    every: Count = 20
    outer_lr: Annotated[Real, Field(gt=0, le=10)] = 0.7
    outer_momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    quantize: Literal["int8", "none"] = "int8"
    overlap: bool = False
    deadline_s: Annotated[Real, Field(gt=0)] | Literal["auto"] = "auto"
    server: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] | None = None
    here: list[int] | None = None
    member: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _known(self) -> Islands:
        for island in (*(self.here or ()), *([] if self.member is None else [self.member])):
            if not 0 <= island < self.count:
                raise ValueError(f"wants islands 0..{self.count - 1}; got {island}")
        return self


class Job(Part):
    """What every kind has. `name` is the run's identity: submitted twice, it resumes."""

    name: Name
    storage: Storage = Storage()
    tracking: Tracking = Tracking()


class TokenizerSpec(Part):
    """Train one (`vocab_size`), or take the one in `path`."""

    vocab_size: Annotated[Count, Field(ge=512, le=262_144)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("wants exactly one of vocab_size (train one) and path (take that one)")
        return self


class CorpusSource(Part):
    """A named set of files (`path` may be a glob), or a set of the shipped demo world (`world: facts|stories|...`)."""

    name: Name
    path: str | None = None
    world: str | None = None
    lang: Language | None = None
    format: Literal["text", "chat"] = "text"
    field: str = "text"
    min_chars: int = 1
    deduplicate: bool = True
    split: Literal["train", "validation"] = "train"

    @model_validator(mode="after")
    def _one(self) -> CorpusSource:
        if (self.path is None) == (self.world is None):
            raise ValueError("wants exactly one of path and world")
        return self


class CorpusSpec(Job):
    """Raw text to token shards: `<storage>/<name>/tokenizer` and `<storage>/<name>/tokens/<source>`."""

    kind: Literal["corpus"]
    sources: Annotated[list[CorpusSource], Field(min_length=1)]
    tokenizer: TokenizerSpec
    sequence_length: Annotated[Count, Field(ge=8, le=131_072)] = 512
    max_bad_rows: Unit = 0.01
    max_row_bytes: Count = 16_000_000
    seed: int = 1


class TrainSpec(Job):
    """Pretraining, full fine-tuning and LoRA: one loop."""

    kind: Literal["train"]
    model: ModelSource
    lora: Lora | None = None
    data: TrainData
    train: TrainLoop
    deepspeed: dict[str, Any] = {"zero_stage": 2}
    scale: Scale = Scale()
    fault_tolerance: FaultTolerance = FaultTolerance()
    islands: Islands | None = None
    register_as: str | None = None


class HeadsSpec(Job):
    """Train p_div on the creative member and p_dev on the factual member; both are model folders."""

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


class Budget(Part):
    """What a sweep may spend, beside its trials: it ends with what is first used up. Money is card-hours at a price."""

    hours: Annotated[Real, Field(gt=0)] | None = None
    card_hours: Annotated[Real, Field(gt=0)] | None = None
    money: Annotated[Real, Field(gt=0)] | None = None
    price_per_card_hour: Annotated[Real, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _priced(self) -> Budget:
        if self.money is not None and not self.price_per_card_hour:
            raise ValueError("money wants price_per_card_hour; got none")
        return self


class Scheduling(Part):
    """When trials are compared, in their own steps.

    asha, hyperband: rungs at `grace * reduction^k`, where the best 1/reduction go on; median: from `grace` on; pbt:
    every `interval` steps, the worst `quantile` takes over from the best.
    """

    grace: Count = 1
    reduction: Annotated[Count, Field(ge=2)] = 3
    brackets: Annotated[Count, Field(le=8)] = 3
    interval: Count = 5
    quantile: Annotated[Real, Field(gt=0, le=0.5)] = 0.25


class Confirm(Part):
    """The best `top` configurations are run again with so many fresh seeds, to the end: what won by luck shows."""

    top: Annotated[Count, Field(le=100)] = 5
    seeds: Count = 3


class Transfer(Part):
    """A learning rate that was best for a model of another width."""

    width: Count
    lr: Annotated[Real, Field(gt=0)]


class SweepSpec(Job):
    """Trials over a space. `target` is a train spec file or `module:function`.

    A light trial runs inside a process that is used again; a heavy one is a fault-tolerant training run with workers of
    its own. `objectives` are further metrics to be good at; `seeds` how many trials each configuration gets.
    """

    kind: Literal["sweep"]
    target: str
    trial: Literal["light", "heavy"] = "light"
    space: dict[str, dict[str, Any]]
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    objectives: dict[str, Literal["min", "max"]] = {}
    trials: Count = 12
    seeds: Count = 1
    confirm: Confirm | None = None
    budget: Budget = Budget()
    max_concurrent: Count = 2
    cpus_per_trial: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_trial: Annotated[Real, Field(ge=0)] = 0.0
    searcher: Literal["random", "grid", "quasi", "tpe"] = "tpe"
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "asha"
    scheduling: Scheduling = Scheduling()
    deadline_s: Annotated[Real, Field(gt=0)] | None = None
    same_failures: Count = 5
    warm_start: dict[str, str] = {}
    transfer_from: Transfer | None = None
    params: dict[str, Any] = {}
    seed: int = 1

    @model_validator(mode="after")
    def _fits(self) -> SweepSpec:
        if self.objectives and self.scheduler != "none":
            raise ValueError(f"objectives wants scheduler none: nothing can be ranked on the way; got {self.scheduler}")
        if self.metric in self.objectives:
            raise ValueError(f"objectives wants metrics beside {self.metric}; got it again")
        if self.warm_start and self.searcher != "tpe":
            raise ValueError(f"warm_start wants a searcher that learns (tpe); got {self.searcher}")
        return self


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
    # float32 keeps the dial's ends within 1e-5 of the single models; auto is float32 on CPU.


class HttpSpec(Part):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    max_body_bytes: Count = 1_000_000
    max_messages: Count = 256
    api_keys_env: str = "TIGER_API_KEYS"
    request_timeout_s: Annotated[Real, Field(gt=0)] = 120.0


class ServeScale(Part):
    replicas: Count = 1
    cpus_per_replica: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[Real, Field(ge=0)] = 0.0
    threads: Count | None = None


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
    dial: DialSpec = DialSpec()
    judge: JudgeSpec = JudgeSpec()
    engine: EngineSpec = EngineSpec()
    http: HttpSpec = HttpSpec()
    scale: ServeScale = ServeScale()


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


Seconds = Annotated[Real, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]
Nodes = Annotated[int, Field(ge=0, le=100_000)]
FaultKind = Literal["process", "hang", "node", "island", "corruption"]


class CauseSpec(Part):
    """A cause of interruptions: how often beside the others, what it hits, how what it hit comes back.

    `nodes` is how many nodes an event of kind island takes (all of the island when absent); `soft` the share that a
    restart of the processes cures, so that no node has to go. `detect_s` and `recover_s` (up to the restore) take the
    place of the policy's.
    """

    name: Name
    count: Positive
    kind: FaultKind = "node"
    nodes: Count | None = None
    soft: Unit = 0.0
    repair: Literal["reboot", "hardware"] = "hardware"
    detect_s: Seconds | None = None
    recover_s: Seconds | None = None


class FailureSpec(Part):
    """How often a card interrupts its job, and why. `weibull_shape` below 1 is infant mortality of the whole fleet."""

    preset: Literal["llama3", "meta-rsc"] = "llama3"
    mtbf_card_hours: Positive | None = None
    causes: Annotated[list[CauseSpec], Field(min_length=1)] | None = None
    weibull_shape: Annotated[Real, Field(ge=0.3, le=3)] = 1.0
    soft_share: Unit = 0.0
    hang_share: Unit = 0.0
    spares_fail: Unit = 1.0
    during_recovery: bool = True


class RepairSpec(Part):
    """Log-normal repair times: the median, and sigma of the logarithm."""

    reboot_median_s: Positive = 900.0
    reboot_sigma: Seconds = 0.2
    hardware_median_s: Positive = 228_600.0
    hardware_sigma: Seconds = 0.59


class PlannedSpec(Part):
    """Planned interruptions of the whole job: how many a day, and how long the job is down before it restores."""

    per_day: Seconds = 0.87
    pause_s: Seconds = 300.0


class HumanSpec(Part):
    """The share of interruptions that need a person, and how long until that person has acted (log-normal)."""

    probability: Unit = 0.0064
    median_s: Positive = 7200.0
    sigma: Seconds = 0.5


class StragglerSpec(Part):
    """Nodes that become slow: how often, and how fast the whole job still is."""

    per_node_day: Seconds = 5.6e-5
    speed: Annotated[Real, Field(gt=0, le=1)] = 0.9


class PolicySpec(Part):
    """What a job does about failures: a preset, and whatever differs from it. Times in seconds."""

    preset: Literal["ours", "ray-train", "dlrover"] = "ours"
    name: Name | None = None
    standbys: Nodes | None = None
    elastic: bool | None = None
    memory: bool | None = None
    memory_every_s: Positive | Literal["auto"] | None = None
    memory_block_s: Seconds | None = None
    memory_restore_s: Seconds | None = None
    memory_survives: list[FaultKind] | None = None
    storage_every_s: Positive | Literal["auto"] | None = None
    storage_block_s: Seconds | None = None
    storage_write_s: Seconds | None = None
    storage_restore_s: Seconds | None = None
    detect_process_s: Seconds | None = None
    detect_hang_s: Seconds | None = None
    detect_node_s: Seconds | None = None
    detect_island_s: Seconds | None = None
    detect_corruption_s: Seconds | None = None
    takeover_s: Seconds | None = None
    restart_s: Seconds | None = None
    swap_warm_s: Seconds | None = None
    swap_cold_s: Seconds | None = None
    shrink_s: Seconds | None = None
    grow_s: Seconds | None = None
    straggler_notice_s: Positive | None = None


class BuySpec(Part):
    """`What should I buy`: the values to try, each combination simulated for every policy of the spec."""

    cards: Annotated[list[Count], Field(min_length=1)] = [1024, 4096, 16384]
    spares_percent: Annotated[list[Annotated[Real, Field(ge=0, le=100)]], Field(min_length=1)] = [0.0, 1.0, 2.0, 4.0]
    standbys: Annotated[list[Nodes], Field(min_length=1)] = [0, 2, 8]
    memory_every_s: Annotated[list[Positive], Field(min_length=1)] = [10.0, 60.0, 300.0]


class SimulateSpec(Job):
    """Predict the goodput of a long training run: cards in nodes and islands, failures, spares, policies.

    `spares` are nodes bought beyond the job, of which a policy keeps its `standbys` warm. `throughput` gives the
    job's relative speed at some numbers of cards, linear in between; without it, speed goes with the cards.
    """

    kind: Literal["simulate"]
    cards: Annotated[Count, Field(le=1_000_000)]
    min_cards: Count | None = None
    size_step_nodes: Count = 1
    cards_per_node: Annotated[Count, Field(le=1024)] = 8
    nodes_per_island: Annotated[Count, Field(le=10_000)] = 2
    spares: Nodes = 2
    days: Annotated[Positive, Field(le=3650)] = 90.0
    step_s: Positive = 10.0
    throughput: list[tuple[Count, Annotated[Real, Field(gt=0)]]] = []
    failures: FailureSpec = FailureSpec()
    repair: RepairSpec = RepairSpec()
    planned: PlannedSpec = PlannedSpec()
    human: HumanSpec = HumanSpec()
    straggler: StragglerSpec = StragglerSpec()
    restore_fails: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    policies: Annotated[list[PolicySpec], Field(min_length=1)] = [
        PolicySpec(preset="ours"),
        PolicySpec(preset="dlrover"),
        PolicySpec(preset="ray-train"),
    ]
    price_per_card_hour: Seconds = 2.5
    replicas: Annotated[Count, Field(ge=2, le=100_000)] = 400
    seed: Annotated[int, Field(ge=0)] = 1
    buy: BuySpec | None = None

    @model_validator(mode="after")
    def _sizes(self) -> SimulateSpec:
        if self.cards % self.cards_per_node:
            raise ValueError(f"cards wants a multiple of cards_per_node ({self.cards_per_node}); got {self.cards}")
        if self.min_cards is not None and self.min_cards > self.cards:
            raise ValueError(f"min_cards wants at most cards ({self.cards}); got {self.min_cards}")
        return self


Spec = CorpusSpec | TrainSpec | HeadsSpec | SweepSpec | ServeSpec | EvalSpec | SimulateSpec
KINDS: dict[str, type[Job]] = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(Spec)}

# What a run may change without becoming another run: where it runs, how it survives, where it reports.
_NOT_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("scale", "fault_tolerance", "tracking", "storage"), True),
    **dict.fromkeys(("max_concurrent", "cpus_per_trial", "gpus_per_trial", "deadline_s", "same_failures"), True),
    "transfer_from": True,
    "islands": {"server", "here", "deadline_s"},
}


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The typed spec in a YAML file, with `a.b=c` overrides applied (values are YAML).

    Raises:
        SpecError: the file is missing, is not YAML, or a field is wrong.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"cannot be read ({error.strerror})", where=str(file), fix="give the path of a spec file"
        ) from None
    except UnicodeDecodeError:
        raise SpecError("is not UTF-8 text", where=str(file), fix="give the path of a YAML spec") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise SpecError(
            f"is not YAML ({getattr(error, 'problem', error)})", where=where, fix="correct this line"
        ) from None
    if not isinstance(raw, dict):
        raise SpecError(
            f"wants a mapping of fields; got {type(raw).__name__}", where=str(file), fix="begin with `kind:`"
        )
    for override in overrides:
        _apply(raw, override)
    return parse_spec(raw, where=str(file), text=text)


def parse_spec(raw: dict[str, Any], *, where: str = "spec", text: str = "") -> Spec:
    """The typed spec of a mapping; `where` and `text` only serve its error messages."""
    kind = raw.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        near = _nearest(str(kind), list(KINDS))
        raise SpecError(
            f"kind: got {kind!r}, wants one of {', '.join(KINDS)}",
            where=_at(where, text, ("kind",)),
            fix=f"did you mean {near}?" if near else "name one of these",
        )
    try:
        return model.model_validate(raw)  # type: ignore[return-value]
    except ValidationError as error:
        raise _spec_error(error, model, raw, where, text) from None


def spec_hash(spec: Spec) -> str:
    """Identity of what a run computes: 16 hex digits over every field but scale, fault tolerance, tracking, storage."""
    fields = spec.model_dump(mode="json", exclude=_NOT_IDENTITY)
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def spec_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The identity fields that differ between two dumped specs, with both values."""
    before, after = flat(old), flat(new)
    keys = [key for key in sorted({*before, *after}) if _NOT_IDENTITY.get(key.split(".")[0]) is not True]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def spec_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The same as lines `field: old -> new`."""
    return [f"{key}: {before!r} -> {after!r}" for key, (before, after) in spec_changes(old, new).items()]


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema of a kind, for editors.

    Raises:
        SpecError: no such kind.
    """
    if kind not in KINDS:
        near = _nearest(kind, list(KINDS))
        raise SpecError(
            f"got {kind!r}, wants one of {', '.join(KINDS)}", where="kind", fix=f"did you mean {near or 'train'}?"
        )
    return KINDS[kind].model_json_schema()


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted fields."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"got {override!r}, wants field.subfield=value", where="--set", fix="e.g. --set train.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"the value of {path} is not YAML: {text!r}", where="--set", fix="quote it") from None
    node: Any = raw
    for key in keys[:-1]:
        node = _child(node, key, override)
    if isinstance(node, list):
        node[_index(node, keys[-1], override)] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, override: str) -> Any:
    child = node[_index(node, key, override)] if isinstance(node, list) else node.setdefault(key, {})
    if child is None and isinstance(node, dict):
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise SpecError(f"{key} holds {child!r}, not a section", where=f"--set {override}", fix="set the field itself")
    return child


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise SpecError(f"got index {key!r}, wants 0..{len(node) - 1}", where=f"--set {override}", fix="name one item")
    return int(key)


def _spec_error(error: ValidationError, model: type[Job], raw: dict[str, Any], where: str, text: str) -> SpecError:
    problem = error.errors()[0]
    location = tuple(part for part in problem["loc"] if not _is_union_tag(part))
    field = ".".join(str(part) for part in location) or "spec"
    got = _shown(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        names = _names_at(model, location[:-1])
        near = _nearest(str(location[-1]), names)
        what, fix = f"{field}: no such field", f"did you mean {near}?" if near else f"wants one of {', '.join(names)}"
    elif problem["type"] == "missing":
        what, fix = f"{field}: is missing", "add it"
    else:
        wants = problem["msg"].removeprefix("Value error, ").replace("Input should be", "wants")
        what = f"{field}: {wants}" if "wants" in wants and "got" in wants else f"{field}: got {got}, {wants}"
        near = _nearest(str(problem.get("input")), re.findall(r"'([^']+)'", problem["msg"]))
        fix = f"did you mean {near}?" if near else "correct this field"
    more = len(error.errors()) - 1
    return SpecError(what + (f" (and {more} more)" if more else ""), where=_at(where, text, location), fix=fix)


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("literal[", "tuple[", "constrained-", "function-")) or part in ("int", "float", "str")
    )


def _names_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        current = (
            _submodel(current.model_fields[part].annotation) if part in getattr(current, "model_fields", {}) else None
        )
        if current is None:
            return []
    return list(current.model_fields)


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_submodel(inner) for inner in get_args(annotation)]
    return next((inner for inner in found if inner), None)


def _nearest(name: str, valid: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, valid, n=1, cutoff=0.5)), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _at(where: str, text: str, location: tuple[Any, ...]) -> str:
    line = _line_of(text, location)
    return f"{where}:{line}" if line else where


def _line_of(text: str, location: tuple[Any, ...]) -> int | None:
    """1-based line of the deepest part of `location` that stands in the YAML text."""
    if not text:
        return None
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return line
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
