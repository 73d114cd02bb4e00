"""What a spec's `deepspeed` section may not ask for: the keys, where it is said, what is said."""

from __future__ import annotations

from typing import Any, NamedTuple


class Refused(NamedTuple):
    """`ends`: a real engine on a CPU ends at it too. The others pass by in silence there, or are a GPU's."""

    name: str
    keys: dict[str, Any]
    where: str
    said: str
    on_gpu: bool = False
    ends: bool = True


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


CPU: dict[str, Any] = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}

REFUSED = [
    Refused("nvme weights", zero(3, offload_param={"device": "nvme"}), "offload_param.device", "offload to cpu", ends=False),
    Refused("nvme state", zero(3, offload_optimizer={"device": "nvme"}), "offload_optimizer.device", "offload to cpu", ends=False),
    Refused("weights below 3", zero(2, offload_param=CPU), "offload_param", "ZeRO 2 does not cut the weights", ends=False),
    Refused("part offloaded", zero(3, offload_optimizer=CPU | {"ratio": 0.5}), "offload_optimizer.ratio", "DeepSpeed's own Adam"),
    Refused("super offload", zero(3, offload_optimizer=CPU | {"super_offload": True}), "super_offload", "no snapshot knows"),
    Refused("zenflow", zero(3, zenflow={}), "zero_optimization.zenflow", "no snapshot knows"),
    Refused("old zero 1", zero(1, legacy_stage1=True), "legacy_stage1", "no more"),
    Refused("no norm", zero(3, compute_grad_norm=False), "compute_grad_norm", "reads the gradient norm"),
    Refused("quantised on a cpu", zero(3, zero_quantized_weights=True), "zero_optimization", "on GPUs only"),
    Refused("bfloat16", zero(3) | {"bfloat16": {"enabled": True}}, "bfloat16", "train.precision: bf16", ends=False),
    Refused("fp16 on a cpu", zero(3) | {"fp16": {"enabled": True}}, "fp16", "is for GPUs"),
    Refused("fp16 and bf16", zero(3) | BF16 | {"fp16": {"enabled": True}}, "fp16", "and not both", on_gpu=True),
    Refused("half masters", zero(3) | MASTERS, "bf16 or fp16", "in half precision"),
    Refused("mixed at 0", zero(0) | BF16 | FP32_GRADIENTS, "grad_accum_dtype", "ZeRO 0 accumulates"),
    Refused("mixed at 1", zero(1) | BF16 | FP32_GRADIENTS, "grad_accum_dtype", "ZeRO 1 with bf16 weights"),
    Refused("scaled early", zero(3) | {"prescale_gradients": True}, "prescale_gradients", "scaled early"),
    Refused("divided early", zero(2) | {"gradient_predivide_factor": 2.0}, "prescale_gradients", "scaled early"),
    Refused("tensor parallel", zero(3) | {"tensor_parallel": {"autotp_size": 2}}, "autotp_size", "by ZeRO alone"),
    Refused("experts", zero(3) | {"expert_parallel": {"enabled": True}}, "expert_parallel", "expert layers", ends=False),
    Refused("hybrid", zero(3) | {"hybrid_engine": {"enabled": True}}, "hybrid_engine", "does not generate", ends=False),
    Refused("device", zero(3, offload_param={"device": "gpu"}), "offload_param.device", "got 'gpu', wants none or cpu"),
    Refused("bucket", zero(3, reduce_bucket_size="many"), "reduce_bucket_size", "got 'many', wants a positive number"),
    Refused("empty bucket", zero(3, reduce_bucket_size=0), "reduce_bucket_size", "got 0, wants a positive number"),
    Refused("dtype on the wire", zero(3) | {"communication_data_type": "x"}, "communication_data_type", "got 'x'"),
    Refused("dtype of gradients", zero(3) | {"data_types": {"grad_accum_dtype": "x"}}, "grad_accum_dtype", "got 'x'"),
    Refused("no mapping", zero(3) | {"bf16": True}, "deepspeed.bf16", "got True, wants a mapping"),
    Refused("no such key", zero(3) | {"bf16": {"enable": True}}, "bf16.enable", "did you mean enabled?"),
    Refused("offload key", zero(3, offload_param=CPU | {"pin_mem": True}), "offload_param.pin_mem", "did you mean pin_memory?"),
    Refused("removed", zero(3) | {"elasticity": {"enabled": True}}, "deepspeed.elasticity", "no such key"),
    Refused("two stages", {"zero_stage": 2} | zero(3), "zero_stage", "zero_optimization.stage says 3", ends=False),
    Refused("accumulation", zero(3) | {"managed_gradient_accumulation": False}, "deepspeed", "set by the train section", ends=False),
]  # fmt: skip
