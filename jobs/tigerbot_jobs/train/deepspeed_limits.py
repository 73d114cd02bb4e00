"""What a spec's `deepspeed` section may not ask for here, known before anything is started.

Each of these would end in a worker: DeepSpeed 0.19.8 refuses it there, or keeps its state where no snapshot is taken of
it (`zero_state.check_layout` is the last to say so). A test puts each before a real engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tigerbot.errors import SpecError

_DTYPES = {"fp32": ("fp32", "float32", "float"), "bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16", "half")}
_COUNTS = ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size")


def check_limits(config: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Look through DeepSpeed's whole config, as `deepspeed_config` makes it for a device of this kind.

    Raises:
        SpecError: it cannot be trained with, or its state cannot be kept.
    """
    asked = _Asked(config, on_gpu)
    _check_values(asked)
    for limit in _LIMITS:
        if limit.met_by(asked):
            raise SpecError(limit.what.format(asked), where=f"deepspeed.{limit.where}", fix=limit.fix)


@dataclass(frozen=True)
class _Asked:
    """A config's parts by name. `{}` in a limit's text is its stage."""

    config: Mapping[str, Any]
    on_gpu: bool

    def __format__(self, spec: str) -> str:
        return str(self.stage)

    @property
    def zero(self) -> Mapping[str, Any]:
        return self.config["zero_optimization"]

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    def section(self, name: str) -> Mapping[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}

    def offload(self, of: str) -> Mapping[str, Any]:
        return self.zero.get(f"offload_{of}") or {}

    @property
    def offloads(self) -> bool:
        """Whether the optimizer runs on the CPU."""
        return self.offload("optimizer").get("device", "none") != "none" or bool(self.zero.get("cpu_offload"))

    @property
    def model_dtype(self) -> str:
        return next((name for name in ("fp16", "bf16") if self.section(name).get("enabled")), "fp32")

    @property
    def gradient_dtype(self) -> str:
        """That gradients are accumulated in."""
        named = self.section("data_types").get("grad_accum_dtype")
        return next((short for short, names in _DTYPES.items() if named in names), self.model_dtype)

    @property
    def halves_masters(self) -> bool:
        keys = (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"))
        return any(self.section(name).get(key) for name, key in keys) or bool(
            self.section("bf16").get("bf16_optimizer_states")
        )

    @property
    def scales_early(self) -> bool:
        """Gradients before they are reduced."""
        return bool(self.config.get("prescale_gradients")) or self.config.get("gradient_predivide_factor", 1) != 1


@dataclass(frozen=True)
class _Limit:
    where: str
    met_by: Callable[[_Asked], Any]
    what: str
    fix: str


_LIMITS = [
    _Limit(
        "zero_optimization.offload_param.device",
        lambda a: a.offload("param").get("device") == "nvme",
        "state on nvme is in no memory that a snapshot could be taken of",
        "offload to cpu",
    ),
    _Limit(
        "zero_optimization.offload_optimizer.device",
        lambda a: a.offload("optimizer").get("device") == "nvme",
        "state on nvme is in no memory that a snapshot could be taken of",
        "offload to cpu",
    ),
    _Limit(
        "zero_optimization.offload_param",
        lambda a: a.stage != 3 and (a.offload("param").get("device", "none") != "none" or a.zero.get("cpu_offload_param")),
        "ZeRO {} does not cut the weights, and leaves them where they are",
        "zero_stage: 3, or remove it",
    ),
    _Limit(
        "zero_optimization.offload_optimizer.super_offload",
        lambda a: a.offload("optimizer").get("super_offload"),
        "SuperOffload keeps its state in a way that no snapshot knows",
        "remove it: offload_optimizer without it works",
    ),
    _Limit(
        "zero_optimization.offload_optimizer.ratio",
        lambda a: a.offload("optimizer").get("ratio", 1.0) != 1.0,
        "a part of the optimizer can be offloaded only with DeepSpeed's own Adam, which this loop does not use",
        "remove it: all of it is offloaded then",
    ),
    _Limit(
        "zero_optimization.zenflow",
        lambda a: a.zero.get("zenflow") is not None,
        "ZenFlow keeps its state in a way that no snapshot knows",
        "remove it: offload_optimizer without it works",
    ),
    _Limit(
        "zero_optimization.legacy_stage1",
        lambda a: a.zero.get("legacy_stage1"),
        "DeepSpeed has the old ZeRO 1 no more",
        "remove it",
    ),
    _Limit(
        "zero_optimization.compute_grad_norm",
        lambda a: not a.zero.get("compute_grad_norm", True),
        "the guard against bad steps reads the gradient norm",
        "remove it",
    ),
    _Limit(
        "zero_optimization",
        lambda a: (
            not a.on_gpu
            and any(a.zero.get(f"zero_quantized_{kind}") for kind in ("weights", "nontrainable_weights", "gradients"))
        ),
        "weights and gradients are quantised on GPUs only",
        "remove zero_quantized_*, or set scale.gpus_per_worker: 1",
    ),
    _Limit(
        "bfloat16",
        lambda a: "bfloat16" in a.config,
        "is not read where there is a bf16, which the train section sets",
        "train.precision: bf16",
    ),
    _Limit(
        "fp16",
        lambda a: a.section("fp16").get("enabled") and not a.on_gpu,
        "fp16 is for GPUs",
        "remove it, or set scale.gpus_per_worker: 1",
    ),
    _Limit(
        "fp16",
        lambda a: a.section("fp16").get("enabled") and a.section("bf16").get("enabled"),
        "weights are fp16 or bf16, and not both",
        "train.precision: fp32 beside it, or remove it",
    ),
    _Limit(
        "bf16 or fp16",
        lambda a: a.halves_masters,
        "master weights and moments in half precision are in no snapshot, which is float32",
        "remove *_master_weights_and_grads and bf16_optimizer_states",
    ),
    _Limit(
        "data_types.grad_accum_dtype",
        lambda a: a.stage == 0 and a.gradient_dtype != a.model_dtype,
        "ZeRO 0 accumulates gradients in the weights' own dtype",
        "zero_stage: 2, or remove it",
    ),
    _Limit(
        "data_types.grad_accum_dtype",
        lambda a: a.stage == 1 and (a.model_dtype, a.gradient_dtype) == ("bf16", "fp32") and not a.offloads,
        "ZeRO 1 with bf16 weights and fp32 gradients keeps its state in a way that no snapshot knows",
        "zero_stage: 2, or remove it",
    ),
    _Limit(
        "prescale_gradients",
        lambda a: a.stage and a.scales_early and a.zero.get("reduce_scatter", True),
        "gradients are scaled early only where they are not reduced by scattering",
        "remove it and gradient_predivide_factor",
    ),
    _Limit(
        "tensor_parallel.autotp_size",
        lambda a: a.section("tensor_parallel").get("autotp_size", 1) not in (0, 1),
        "weights are cut over ranks by ZeRO alone",
        "remove it; zero_stage: 3 cuts them too",
    ),
    _Limit(
        "expert_parallel",
        lambda a: a.section("expert_parallel").get("enabled"),
        "expert layers keep their state in a way that no snapshot knows",
        "remove it",
    ),
    _Limit(
        "hybrid_engine",
        lambda a: a.section("hybrid_engine").get("enabled"),
        "this loop trains and does not generate",
        "remove it",
    ),
]  # fmt: skip


def _check_values(asked: _Asked) -> None:
    """Raises: SpecError: a value that DeepSpeed does not know."""
    for of in ("param", "optimizer"):
        device = asked.offload(of).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            where = f"deepspeed.zero_optimization.offload_{of}.device"
            raise SpecError(f"got {device!r}, wants none or cpu", where=where, fix="name one of these")
    for key in _COUNTS:
        count = asked.zero.get(key, 1)
        if not isinstance(count, int | float) or count < (key == "reduce_bucket_size"):
            where = f"deepspeed.zero_optimization.{key}"
            raise SpecError(f"got {count!r}, wants a positive number", where=where, fix="correct or remove it")
    dtypes = {
        "communication_data_type": (asked.config.get("communication_data_type"), tuple(_DTYPES)),
        "data_types.grad_accum_dtype": (asked.section("data_types").get("grad_accum_dtype"), sum(_DTYPES.values(), ())),
    }
    for where, (dtype, known) in dtypes.items():
        if dtype is not None and dtype not in known:
            raise SpecError(
                f"got {dtype!r}, wants fp32, bf16 or fp16", where=f"deepspeed.{where}", fix="name one of these"
            )
