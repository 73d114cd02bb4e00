"""The names that may stand in a spec's `deepspeed` section.

DeepSpeed reads its config by name and passes by what it does not know, so that a misspelt key changes nothing and says
nothing; below `zero_optimization` it stops, but in a worker, after everything has started. The names are written down here
because importing DeepSpeed takes seconds; a test compares them with the installed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from tigerbot.errors import SpecError

KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
        "zero_stage",
    ]
)
ZERO_KEYS = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)


BF16_KEYS = frozenset(
    [
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
        "check_grad_overflow",
        "enabled",
        "immediate_grad_update",
    ]
)
FP16_KEYS = frozenset(
    [
        "auto_cast",
        "consecutive_hysteresis",
        "enabled",
        "fp16_master_weights_and_grads",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    ]
)
OFFLOAD_PARAM_KEYS = frozenset(["buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"])
OFFLOAD_OPTIMIZER_KEYS = frozenset(
    [
        "buffer_count",
        "cpuadam_cores_perc",
        "device",
        "fast_init",
        "nvme_path",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "ratio",
        "super_offload",
    ]
)


def check_keys(section: Mapping[str, Any]) -> None:
    """Raises: SpecError: DeepSpeed has no such key, or its value is no mapping where it wants one."""
    _check(section, KEYS, "deepspeed")
    zero = _mapping(section, "zero_optimization", "deepspeed", "write stage: 2 below it")
    _check(zero, ZERO_KEYS, "deepspeed.zero_optimization")
    for name, known in (("bf16", BF16_KEYS), ("fp16", FP16_KEYS)):
        _check(_mapping(section, name, "deepspeed", "write enabled: true below it"), known, f"deepspeed.{name}")
    _mapping(section, "data_types", "deepspeed", "write grad_accum_dtype: fp32 below it")
    for name, known in (("offload_param", OFFLOAD_PARAM_KEYS), ("offload_optimizer", OFFLOAD_OPTIMIZER_KEYS)):
        where = "deepspeed.zero_optimization"
        _check(_mapping(zero, name, where, "write device: cpu below it"), known, f"{where}.{name}")


def _mapping(section: Mapping[str, Any], name: str, where: str, fix: str) -> Mapping[str, Any]:
    found = section.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise SpecError(f"got {found!r}, wants a mapping", where=f"{where}.{name}", fix=fix)
    return found


def _check(given: Iterable[Any], known: frozenset[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise SpecError("DeepSpeed has no such key", where=f"{where}.{key}", fix=fix)
