"""`kind: train`: data, the optimisation, how many workers, how the run survives, islands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tigerbot.spec.model import Lora, ModelSource
from tigerbot.spec.parts import Count, Job, Part, Real, Unit


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
