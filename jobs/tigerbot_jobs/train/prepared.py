"""What a worker process has ready before it has a rank, and keeps from one process group to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tigerbot.errors import CorruptError
from tigerbot.models import tokenizer_hash
from tigerbot.storage import open_store
from tigerbot_jobs.train.checkpoint import Checkpoints, Header
from tigerbot_jobs.train.data import BatchPlan, TrainingData
from tigerbot_jobs.train.engine import Engine, peak_flops, trained_module
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.identity import model_fields
from tigerbot_jobs.train.keeping import Progress
from tigerbot_jobs.train.model import LanguageModel, make_model, tokenizer_folder
from tigerbot_jobs.train.reshard import Read
from tigerbot_jobs.train.shard import ShardMeta


class Prepared:
    """What a process has ready before it has a rank, and keeps from one process group to the next."""

    def __init__(self, job: WorkerJob, device: torch.device, *, verify: bool) -> None:
        torch.set_num_threads(job.threads)
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        # Deterministic mode also fills every fresh tensor with NaN to show bugs: a tenth of a small model's step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        spec = job.spec
        self.job, self.device = job, device
        self.tokenizer = tokenizer_folder(spec.model)
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.data = TrainingData(
            job.train,
            job.validation,
            sequence_length=spec.data.sequence_length,
            tokenizer_hash=self.tokenizer_hash,
            seed=spec.train.seed,
            verify=verify,
        )
        self.data_hash = job.data_hash
        self.say: Callable[[str], None] = print
        self._module: LanguageModel | None = None
        self._model: dict[str, Any] = {}
        self._peak = 0.0

    def module(self, *, fresh: bool) -> LanguageModel:
        """The model: the one there is, or as the seed makes it. ZeRO 3 cuts a module's weights up for good."""
        if fresh or self._module is None:
            model = make_model(self.job.spec)
            self._model = model_fields(model)
            self._module = trained_module(model, self.job.spec.train, self.device)
        return self._module

    def forget_module(self) -> None:
        self._module = None

    def peak_flops(self, precision: str) -> float:
        """Of one rank, measured once."""
        self._peak = self._peak or peak_flops(self.device, precision)
        return self._peak

    def header(self, engine: Engine, step: int, world_size: int, generation: int = 0) -> Header:
        """What a checkpoint of this run says of itself."""
        about = (self.job.hash, self.tokenizer_hash, self.job.threads, generation)
        return Header(step, world_size, engine.zero_stage, *about, data_hash=self.data_hash, model=self._model)

    def restored(self, engine: Engine) -> Progress:
        """Collective. Put in the newest checkpoint in storage that is whole; step 0 where there never was one.

        Raises:
            IdentityError: it is of another spec, model, tokenizer or data.
            CorruptError: there are some, and all are damaged.
        """
        checkpoints, damaged = self.checkpoints(), None
        while (key := checkpoints.latest()) is not None:
            damaged = key
            header = checkpoints.header(key)
            if header is None:
                continue
            identity = {"spec_hash": self.job.hash, "tokenizer_hash": self.tokenizer_hash, "data_hash": self.data_hash}
            header.check(f"checkpoint {key}", **identity, model=self._model)
            kept: list[dict[str, Any]] = []

            def put(shards: list[ShardMeta], read: Read, kept: list[dict[str, Any]] = kept) -> None:
                engine.restore(shards, read)
                kept.append(shards[0].extra)

            if checkpoints.restore(key, put, wanted=engine.shards_read):
                return Progress.of(header.step, kept[0])
        if damaged is not None:
            raise CorruptError("no whole checkpoint is left", where=damaged, fix="--replace begins anew")
        return Progress(0)

    def checkpoints(self) -> Checkpoints:
        spec = self.job.spec
        prefix, keep = f"{spec.name}/checkpoints", spec.storage.keep
        return Checkpoints(open_store(spec.storage.uri), prefix, keep=keep, say=self.say)


def make_engine(prepared: Prepared, plan: BatchPlan, *, fresh: bool, on_phase: Callable[[str], None] | None) -> Engine:
    """An engine in the process group there is."""
    spec = prepared.job.spec
    module = prepared.module(fresh=fresh)
    return Engine(module, spec.train, spec.deepspeed, plan, prepared.device, on_phase=on_phase)
