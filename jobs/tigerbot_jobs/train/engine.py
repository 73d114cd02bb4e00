"""The engine: a model under DeepSpeed ZeRO 0-3, one global batch a call. CPU and gloo, GPU and NCCL.

It knows nothing about where batches come from, schedules, or where its state is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tigerbot.models import save_model
from tigerbot.spec import TrainLoop
from tigerbot.tokens import IGNORE, Batch
from tigerbot_jobs.train import loss_scale, zero_state
from tigerbot_jobs.train.adam8bit import AdamW8bit, with_bits
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.deepspeed_config import deepspeed_config
from tigerbot_jobs.train.model import LanguageModel
from tigerbot_jobs.train.reshard import Read, assemble, shards_read
from tigerbot_jobs.train.shard import ShardMeta, Slice
from tigerbot_jobs.train.watch.checksums import replica_digest

Phase = Callable[[str], None]


class Engine:
    """A model that trains, in one process group.

    Args:
        module: as `trained_module` makes it; it may have been in an engine that is closed, below ZeRO 3.
        loop: optimizer settings.
        deepspeed: passes through to DeepSpeed's config; `zero_stage: n` is short for `zero_optimization: {stage: n}`.
        plan: how a global batch is cut.
        device: of this rank.
        on_phase: told what the engine does, for the heartbeat.
    """

    def __init__(
        self,
        module: LanguageModel,
        loop: TrainLoop,
        deepspeed: dict[str, Any],
        plan: BatchPlan,
        device: torch.device,
        *,
        on_phase: Phase | None = None,
    ) -> None:
        import deepspeed as ds

        low_precision = precision_of(loop, device) == "bf16"
        self.device, self.precision = device, precision_of(loop, device)
        self._on_phase = on_phase or (lambda phase: None)
        self._norm = 0.0
        self.own_s = 0.0  # of the last step, in the forward passes: outside of any collective below ZeRO 3
        on_gpu = device.type == "cuda"
        config = deepspeed_config(loop, deepspeed, plan, parameters=trainable(module), bf16=low_precision and on_gpu)
        made = ds.initialize(model=module, optimizer=_optimizer(module, loop), config=config, dist_init_required=False)
        self._ds: Any = made[0]
        self._plan, self._world_size = plan, dist.get_world_size()
        self._slices = tuple(zero_state.slices(self._ds))
        zero_state.clear_padding(self._ds)

    @property
    def model(self) -> Any:
        """The causal LM."""
        return self._ds.module.model

    def step(self, batches: Sequence[Batch], *, lr: float, counted_tokens: int) -> Tensor:
        """One optimizer step on this rank's micro batches; the sum of its token losses, on the device.

        `counted_tokens` is the number of labels over all ranks: the gradient is of their mean, however they are spread.
        """
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed divides by the number of micro batches and of ranks; we want one mean over tokens.
        scale = self._plan.micro_steps * self._world_size / max(counted_tokens, 1)
        total = torch.zeros((), device=self.device)
        self.own_s = 0.0
        for batch in batches:
            self._on_phase("forward")
            began = time.perf_counter()
            loss = self._ds(*self._tensors(batch))
            self.own_s += time.perf_counter() - began
            self._on_phase("backward")
            self._ds.backward(loss * scale)
            self._on_phase("step")
            self._ds.step()
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """(sum of token losses, number of labels) on this rank, float64, without training."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._ds.module.eval()
        for batch in batches:
            total[0] += self._ds.module(*self._tensors(batch)).double()
            total[1] += count_labels([batch])
        self._ds.module.train()
        return total

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; of the one before where fp16's scale was too large.

        Such a step was left out and the scale halved: that is how a scale is found, and no fault.
        """
        if not loss_scale.left_out(self._ds):
            self._norm = float(self._ds.get_global_grad_norm() or 0.0)
        return self._norm

    def state(self) -> dict[str, Tensor]:
        """This rank's state, views of the engine's own memory; see `zero_state`."""
        return zero_state.read_state(self._ds)

    def shard(self, *, generation: int = 0, extra: dict[str, Any] | None = None) -> ShardMeta:
        """What `state` is of, as it stands between two steps."""
        return ShardMeta(
            step=self._ds.global_steps,
            rank=dist.get_rank(),
            world_size=self._world_size,
            zero_stage=self.zero_stage,
            generation=generation,
            slices=self._slices,
            extra=zero_state.counters(self._ds) | (extra or {}),
        )

    def shards_read(self, shards: Sequence[ShardMeta]) -> set[int]:
        """The indices of the shards that `restore` reads from on this rank."""
        return shards_read(self._slices, shards, prefer=dist.get_rank())

    def restore(self, shards: Sequence[ShardMeta], read: Read) -> None:
        """Collective. Put in a state that was cut for any world size and ZeRO stage; see `reshard`."""
        assemble(self._ds, shards, read)

    def slices(self) -> list[Slice]:
        """Which parts of which parameters the state's flat tensors hold."""
        return list(self._slices)

    def replica_digests(self) -> Tensor:
        """Collective. A digest of the weights of every rank, in order of rank; they agree below ZeRO 3."""
        mine = replica_digest(self._ds.module.parameters()).reshape(1).to(self.device)
        found = [torch.zeros_like(mine) for _ in range(self._world_size)]
        dist.all_gather(found, mine)
        return torch.cat(found)

    def settle(self, *, step: int) -> None:
        """Collective. What was written into `state` counts from now on, `step` steps done."""
        zero_state.settle(self._ds, step=step)

    @property
    def zero_stage(self) -> int:
        """At stage 0 every rank holds the same whole state, so that one of them may keep it for all."""
        return self._ds.zero_optimization_stage()

    def close(self) -> None:
        """Give the module back, without hooks; below ZeRO 3 another engine may take it."""
        self._ds.destroy()
        for parameter in self._ds.module.parameters():
            parameter.grad = None
        self._ds = None

    def save(self, tokenizer: Any, folder: Path, base: Path | None) -> None:
        """Write the model (or its adapter) as a Hugging Face folder, from rank 0. Every rank must call it."""
        with self._gathered():
            if dist.get_rank() == 0:
                save_model(self.model, tokenizer, folder, base=base)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self._ds.zero_optimization_stage() != 3:
            yield
            return
        import deepspeed as ds

        with ds.zero.GatheredParameters(list(self._ds.module.parameters())):
            yield

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        arrays = (batch.input_ids, batch.labels, batch.position_ids)
        ids, labels, positions = (torch.from_numpy(array.copy()).to(self.device) for array in arrays)
        return ids, labels, positions


def trained_module(model: Any, loop: TrainLoop, device: torch.device) -> LanguageModel:
    """A causal LM, float32, as an engine takes it."""
    # On a GPU DeepSpeed keeps bf16 weights and float32 masters; on a CPU the weights stay float32 and only the
    # matrix products run in bf16, which is where the time is.
    on_cpu = precision_of(loop, device) == "bf16" and device.type == "cpu"
    return LanguageModel(model, torch.bfloat16 if on_cpu else None)


def precision_of(loop: TrainLoop, device: torch.device) -> str:
    """bf16 or fp32."""
    automatic = device.type == "cuda" or cpu_has_bf16()
    return "bf16" if loop.precision == "bf16" or (loop.precision == "auto" and automatic) else "fp32"


def count_labels(batches: Sequence[Batch]) -> int:
    """Labels that carry loss."""
    return sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def connect_ranks(rank: int, world_size: int, device: torch.device) -> None:
    """Hand the process group that exists to DeepSpeed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as ds

    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", str(rank))
    ds.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that this device reaches in a large matrix product, measured for 0.2 s."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < until:
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Training FLOPs of one token (Chowdhery et al. 2022, appendix B); a frozen weight needs no gradient of its own."""
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    config = model.config
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 4 * total + 2 * trained + attention


def _optimizer(module: torch.nn.Module, loop: TrainLoop) -> torch.optim.Optimizer:
    groups = _groups(module, loop.weight_decay)
    if loop.optimizer == "adamw8bit":
        return AdamW8bit(with_bits(groups, module), lr=loop.lr, betas=loop.betas, eps=1e-8)
    return torch.optim.AdamW(groups, lr=loop.lr, betas=loop.betas, eps=1e-8, fused=True)


def _groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in module.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
