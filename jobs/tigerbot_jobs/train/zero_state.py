"""Where DeepSpeed 0.19.8 keeps the state of a rank: the one file that reaches into its private names.

A rank's state is a few flat float32 tensors (its part of the master weights) and, for each, Adam's two moments and
step count. Stage 0 has one flat tensor a parameter, stages 1 and 2 one a parameter group, stage 3 one a sub-group.
`slices` says which elements of which parameter lie where in them, so that a state is known by names and not by ranks.
Between the slices there may be padding, which belongs to no parameter and is kept at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tigerbot.errors import SpecError
from tigerbot_jobs.train.adam8bit import AdamW8bit, as_float, put_moments
from tigerbot_jobs.train.loss_scale import read_scale, write_scale
from tigerbot_jobs.train.shard import Slice

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("master", *MOMENTS)


def slices(engine: Any) -> list[Slice]:
    """What this rank holds, in order of group and offset.

    A tied weight is there once, under the first of its names; a frozen one not at all.

    Raises:
        SpecError: this DeepSpeed configuration keeps its state in a way that is not known here.
    """
    check_layout(engine)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    placed = _placed_0(engine) if stage == 0 else _placed_3(engine) if stage == 3 else _placed_12(engine)
    found = [Slice(names[id(parameter)], *place) for parameter, place in placed]
    return sorted(found, key=lambda piece: (piece.group, piece.offset))


def parameter_names(engine: Any) -> set[str]:
    """The parameters that train, under the names that `slices` uses."""
    return {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def read_state(engine: Any) -> dict[str, Tensor]:
    """The state as flat float32 tensors `{group}.{part}`, on the engine's device: views of its own memory.

    Before the first step there are no moments yet; zeros stand for them.
    """
    state: dict[str, Tensor] = {}
    for group, (master, adam) in enumerate(_flats(engine)):
        state[f"{group}.master"] = master.detach().view(-1)
        for name in MOMENTS:
            state[f"{group}.{name}"] = _moment(master, adam, name)
        state[f"{group}.step"] = torch.as_tensor(adam.get("step", 0.0), dtype=torch.float32).view(1)
    return state


@torch.no_grad()
def writable_state(engine: Any) -> dict[str, Tensor]:
    """As `read_state`, to be written into: the moments exist, and padding is zero. `settle` when it is written."""
    for master, adam in _flats(engine):
        for name in MOMENTS:
            if name not in adam and not isinstance(_adam(engine), AdamW8bit):
                adam[name] = torch.empty_like(master, requires_grad=False)
        if not isinstance(adam.get("step"), Tensor):
            # Fused Adam wants its step count on the device.
            adam["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    state = read_state(engine)
    _clear_padding(state, slices(engine), PARTS)
    if isinstance(_adam(engine), AdamW8bit):
        engine.tiger_written = state  # `settle` rounds the moments to 8 bits again
    return state


@torch.no_grad()
def clear_padding(engine: Any) -> None:
    """Make padding, which stage 3 leaves as the allocator gave it, zero: a state's bytes are then the run's alone."""
    held = slices(engine)
    _clear_padding(read_state(engine), held, ("master",))
    _refresh_weights(engine)


def counters(engine: Any) -> dict[str, Any]:
    """What a state knows beside its tensors, as JSON."""
    return {"skipped_steps": engine.skipped_steps, "loss_scale": read_scale(engine)}


@torch.no_grad()
def settle(engine: Any, *, step: int, counted: Mapping[str, Any] | None = None) -> None:
    """Collective. Carry a state that was written over into the weights, and set the counters to `step` steps done.

    Args:
        counted: what `counters` said of that state.
    """
    counted = counted or {}
    written = engine.__dict__.pop("tiger_written", None)
    if written is not None:
        _put_small_moments(engine, written)
    _refresh_weights(engine)
    engine.global_steps = step
    # Decides where DeepSpeed ends an accumulation.
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
    engine.skipped_steps = counted.get("skipped_steps", 0)
    write_scale(engine, counted.get("loss_scale", {}))


def forget_ranks() -> None:
    """Let DeepSpeed begin anew in a living process, with other ranks; torch's process group is destroyed already.

    It also numbers parameters and modules from 0 again: at stage 3 ranks compare these, and a newcomer's begin there.
    And it takes back stage 3's own linear layer, whose gradients come in another order: at another stage ranks that
    have it and ranks that do not would reduce different buckets together.
    """
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init, InsertPostInitMethodToModuleSubClasses
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references()
    Init.param_id = 0
    counter = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    assert counter is not None
    counter[0][0] = 0
    torch.nn.functional.linear = getattr(
        InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear
    )


def check_layout(engine: Any) -> None:
    """Raises: SpecError: this DeepSpeed configuration keeps its state in a way that is not known here."""
    stage, kind = engine.zero_optimization_stage(), type(engine.optimizer).__name__
    known = {
        0: ("FP16_UnfusedOptimizer",),
        1: ("DeepSpeedZeroOptimizer",),
        2: ("DeepSpeedZeroOptimizer",),
        3: ("DeepSpeedZeroOptimizer_Stage3",),
    }[stage]
    if kind not in known and not (stage == 0 and _plain(engine.optimizer)):
        raise _unknown(f"ZeRO {stage} with these keys is a {kind}", "use zero_stage: 2 with DeepSpeed's default dtypes")
    if engine.has_moe_layers:
        raise _unknown("the model has expert layers", "train a dense model")
    for master, _ in _flats(engine):
        if master.dtype != torch.float32 or not master.numel() or not master.is_contiguous():
            raise _unknown(
                "the master weights are not float32 in memory",
                "remove offload to nvme and half-precision master weights",
            )


def _plain(optimizer: Any) -> bool:
    """Whether this is torch's own optimizer, with nothing of DeepSpeed's around it."""
    return isinstance(optimizer, torch.optim.Optimizer)


def _unknown(what: str, fix: str) -> SpecError:
    return SpecError(f"{what}, whose state cannot be kept", where="deepspeed", fix=fix)


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that holds the moments."""
    zero = engine.optimizer
    return zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer


def _moment(master: Tensor, adam: dict[str, Any], name: str) -> Tensor:
    """A moment as float32: its own memory, or what its 8 bits stand for."""
    if name in adam:
        return adam[name].view(-1)
    if f"{name}.codes" in adam:
        return as_float(adam, name, 0, master.numel())
    return torch.zeros_like(master).view(-1)


def _put_small_moments(engine: Any, state: dict[str, Tensor]) -> None:
    adam = _adam(engine)
    groups = {id(flat): group for group in adam.param_groups for flat in group["params"]}
    for index, (master, _) in enumerate(_flats(engine)):
        found = {name: state[f"{index}.{name}"] for name in MOMENTS} | {"step": state[f"{index}.step"].view(())}
        put_moments(adam, master, groups[id(master)], found)


def _flats(engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every flat master tensor with the optimizer's own dict for it."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        # Both torch's optimizer and DeepSpeed's wrapper of it have these.
        masters, states = [p for group in zero.param_groups for p in group["params"]], zero.state
    else:
        masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        states = zero.optimizer.state
    return [(master, states[master]) for master in masters]


_Placed = Iterator[tuple[Any, tuple[tuple[int, ...], int, int, int, int]]]  # parameter, its Slice but for the name


def _placed_0(engine: Any) -> _Placed:
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None:
        groups = [group["params"] for group in engine.optimizer.param_groups]
    for index, parameter in enumerate(p for group in groups for p in group):
        yield parameter, (tuple(parameter.shape), 0, parameter.numel(), index, 0)


def _placed_12(engine: Any) -> _Placed:
    for group, parameters in enumerate(engine.optimizer.bit16_groups):
        for parameter in parameters:
            mapping = parameter._hp_mapping  # None: this rank holds none of it
            if mapping is not None:
                inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, (tuple(parameter.shape), inside.start, flat.numel, group, flat.start)


def _placed_3(engine: Any) -> _Placed:
    """Every parameter is cut in as many equal pieces as there are ranks, the last ones padded."""
    zero = engine.optimizer
    for parameters in zero.fp16_groups:
        for parameter in parameters:
            group, offset, piece = zero.grad_position[zero.get_param_id(parameter)]
            start = piece * zero._get_param_partition_rank(parameter)
            numel = min(piece, parameter.ds_numel - start)
            if numel > 0:
                yield parameter, (tuple(parameter.ds_shape), start, numel, group, offset)


def _clear_padding(state: dict[str, Tensor], held: list[Slice], parts: tuple[str, ...]) -> None:
    ends = dict.fromkeys(range(len(state) // (len(PARTS) + 1)), 0)
    gaps = []
    for piece in held:
        gaps.append((piece.group, ends[piece.group], piece.offset))
        ends[piece.group] = piece.offset + piece.numel
    gaps += [(group, end, state[f"{group}.master"].numel()) for group, end in ends.items()]
    for group, begin, end in gaps:
        if begin < end:
            for part in parts:
                state[f"{group}.{part}"][begin:end].zero_()


def _refresh_weights(engine: Any) -> None:
    """Collective. Carry the master weights over into the weights that the forward pass reads."""
    zero: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0 and not _plain(zero):
        for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master)
    elif stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            flat = zero.fp16_partitioned_groups_flat[index]
            if flat.data_ptr() != master.data_ptr():
                flat.copy_(master)
            pieces = zero.unflatten(flat, zero.fp16_partitioned_groups[index])
            for piece, value in zip(zero.fp16_partitioned_groups[index], pieces, strict=True):
                piece.data = value.data
        # Small parameters stay gathered between steps: what is gathered is old now.
        kept = zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
