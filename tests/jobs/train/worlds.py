"""Real engines at world sizes 1-4 in a few processes that live through all of them, as survivors of a fault do."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tigerbot.errors import TigerError
from tigerbot_jobs.train import zero_state
from tigerbot_jobs.train.loss_scale import left_out
from tigerbot_jobs.train.reshard import assemble
from tigerbot_jobs.train.shard import ShardMeta

VOCABULARY, LENGTH, BATCH, MICRO = 503, 5, 24, 2


@dataclass(frozen=True)
class Case:
    """An engine. `kind`: plain, tied (one weight for both ends), lora (frozen base)."""

    stage: int
    hidden: int = 65
    bf16: bool = False
    kind: str = "plain"


@dataclass(frozen=True)
class Saved:
    """What one rank held."""

    meta: ShardMeta
    state: dict[str, Tensor]


class Worlds:
    """Processes that take work: `run(world_size, work, *args)` gives what `work(rank, *args)` returned on each rank."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pipes]
        self._folder, self._meetings = folder, 0
        for process in self._processes:
            process.start()

    def run(self, world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        self._meetings += 1
        meeting = str(self._folder / f"meeting-{self._meetings}")
        for rank, end in enumerate(self._ends[:world_size]):
            end.send((meeting, rank, world_size, work, args))
        found: dict[Any, Any] = {}
        while len(found) < world_size:
            # A rank that failed leaves the others in a collective: its error first.
            for end in wait([end for end in self._ends[:world_size] if end not in found]):
                found[end] = end.recv()
                if isinstance(found[end], Exception):
                    raise found[end]
        return [found[end] for end in self._ends[:world_size]]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(end: Connection) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    while True:
        meeting, rank, world_size, work, args = end.recv()
        try:
            with _group(meeting, rank, world_size):
                end.send(work(rank, *args))
        except Exception as error:
            end.send(error)


@contextmanager
def _group(meeting: str, rank: int, world_size: int) -> Any:
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()
        zero_state.forget_ranks()


class OddModel(nn.Module):
    """Nothing in it divides by 2, 3 or 4."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        hidden = case.hidden
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 201), nn.Linear(201, hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.unused = nn.Parameter(torch.zeros(1))
        self.lora = case.kind == "lora"
        if case.kind == "tied":
            self.head.weight = self.embed.weight
        if self.lora:
            self.requires_grad_(False)
            for parameter in self.parameters():
                # A frozen base is the same in every process: it is no part of the state.
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
            self.lora_a, self.lora_b = nn.Linear(hidden, 3, bias=False), nn.Linear(3, hidden)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))
        if self.lora:
            hidden = hidden + self.lora_b(self.lora_a(hidden))
        return nn.functional.cross_entropy(self.head(hidden + 0 * self.unused).float().flatten(0, 1), labels.flatten())


def make_engine(case: Case, *, seed: int, keys: dict[str, Any] | None = None) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model = OddModel(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": BATCH // (MICRO * dist.get_world_size()),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.bf16},
        "zero_optimization": {
            "stage": case.stage,
            "reduce_bucket_size": 10**6,
            "allgather_bucket_size": 10**6,
            "stage3_param_persistence_threshold": 100,
        },
    }
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config | (keys or {}), dist_init_required=False)[
        0
    ]
    zero_state.clear_padding(engine)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    """Go on for some steps; the mean loss of each global batch."""
    losses = []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(engine.global_steps, engine.global_steps + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        ids[:, 1:] = (ids[:, :1] + torch.arange(1, LENGTH + 1)) % VOCABULARY  # something to learn
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step / 10)
        mine = ids.chunk(world_size)[rank].split(MICRO)
        total = torch.zeros(())
        for part in mine:
            loss = engine(part[:, :-1], part[:, 1:])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / len(mine) / world_size
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def save(engine: Any) -> Saved:
    meta = ShardMeta(
        step=engine.global_steps,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        zero_stage=engine.zero_optimization_stage(),
        generation=0,
        slices=tuple(zero_state.slices(engine)),
        extra=zero_state.counters(engine),
    )
    return Saved(meta, {name: tensor.clone() for name, tensor in zero_state.read_state(engine).items()})


def restore(engine: Any, saved: Sequence[Saved]) -> None:
    def read(shard: int, name: str, begin: int, end: int) -> Tensor:
        return saved[shard].state[name][begin:end]

    assemble(engine, [each.meta for each in saved], read)


def full_state(saved: Sequence[Saved]) -> dict[str, Tensor]:
    """Every parameter's parts, whole, however they are cut; Adam's step count beside them."""
    full: dict[str, Tensor] = {}
    for each in saved:
        for piece in each.meta.slices:
            for part in zero_state.PARTS:
                whole = full.setdefault(
                    f"{piece.name}.{part}", torch.full((torch.Size(piece.shape).numel(),), torch.nan)
                )
                flat = each.state[f"{piece.group}.{part}"]
                whole[piece.start : piece.start + piece.numel] = flat[piece.offset : piece.offset + piece.numel]
            full[f"{piece.name}.step"] = each.state[f"{piece.group}.step"]
    return full


def digest(saved: Sequence[Saved]) -> str:
    """SHA-256 of a state, which does not depend on how it is cut."""
    found = hashlib.sha256()
    for name, tensor in sorted(full_state(saved).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def bytes_digest(saved: Sequence[Saved]) -> list[str]:
    """SHA-256 of every rank's flat tensors, padding and all."""
    return [hashlib.sha256(b"".join(t.numpy().tobytes() for t in each.state.values())).hexdigest() for each in saved]


# Work for `Worlds.run`.


def begin(rank: int, case: Case, steps: int) -> tuple[list[float], Saved]:
    engine = make_engine(case, seed=1)
    losses = train(engine, steps)
    return losses, save(engine)


def go_on(rank: int, case: Case, saved: list[Saved], steps: int) -> tuple[Saved, list[float], Saved]:
    """Restored, what that gave, then some steps."""
    engine = make_engine(case, seed=2)
    restore(engine, saved)
    restored = save(engine)
    losses = train(engine, steps)
    return restored, losses, save(engine)


def roll_back(rank: int, case: Case, steps: int) -> tuple[list[float], list[float]]:
    """The same steps twice in one engine: the second time after its own earlier state was put back into it."""
    engine = make_engine(case, seed=1)
    train(engine, 2)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, save(engine))
    first = train(engine, steps)
    restore(engine, every)
    return first, train(engine, steps)


def compare_with_deepspeed(rank: int, case: Case) -> tuple[Any, list[Any]]:
    """DeepSpeed's own map of name to place, and ours."""
    engine = make_engine(case, seed=1)
    theirs = [
        {name: (place.start, place.numel) for name, place in group.items()}
        for group in engine.optimizer.state_dict()["param_slice_mappings"]
    ]
    return theirs, zero_state.slices(engine)


def refused(rank: int, case: Case, keys: dict[str, Any]) -> str:
    try:
        make_engine(case, seed=1, keys=keys)
    except TigerError as error:
        return str(error)
    return ""


# DeepSpeed trains fp16 on a CPU if it believes that it can.
fp16_believed = mock.patch("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", lambda self: True)


@fp16_believed
def go_on_in_fp16(rank: int, stage: int, saved: list[Saved], steps: int) -> tuple[list[float], Saved]:
    """The loss scale after each step, and the last state."""
    fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 2}
    engine = make_engine(Case(stage), seed=1, keys={"fp16": fp16})
    if saved:
        restore(engine, saved)
    scales = []
    for _ in range(steps):
        train(engine, 1)
        scales.append(zero_state.counters(engine)["loss_scale"]["cur_scale"])
    return scales, save(engine)


@fp16_believed
def norms_in_fp16(rank: int, stage: int) -> list[tuple[float, bool]]:
    """The gradient norm as the guard sees it, and whether DeepSpeed made the step."""
    # Transformers take seconds to import, and the other work does not need them.
    from tigerbot.models import build
    from tigerbot.spec import TrainLoop
    from tigerbot.tokens import Batch
    from tigerbot_jobs.train.data import BatchPlan
    from tigerbot_jobs.train.engine import Engine, trained_module

    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 14, "hysteresis": 1}}
    loop, device = TrainLoop(tokens=1, precision="fp32"), torch.device("cpu")
    module = trained_module(build("tiny", 512, 1), loop, device)
    engine = Engine(module, loop, {"zero_stage": stage} | fp16, BatchPlan(1, 1, 1, 1), device)
    ids = np.arange(16, dtype=np.int64)[None]
    found = []
    for _ in range(8):
        engine.step([Batch(ids, ids, ids, np.ones_like(ids))], lr=1e-3, counted_tokens=15)
        found.append((engine.grad_norm, not left_out(engine._ds)))
    engine.close()
    return found


def ends_at(rank: int, keys: dict[str, Any]) -> str:
    """What a real engine says of these keys, in whatever kind of error; nothing where it makes a step."""
    try:
        train(make_engine(Case(2), seed=1, keys=keys), 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def state_of(world: list[tuple[Any, ...]], index: int = -1) -> list[Saved]:
    return [found[index] for found in world]
