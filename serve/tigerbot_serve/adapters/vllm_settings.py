"""How vLLM is started: our spec as its engine's arguments and its process's environment. Needs no vLLM.

Nothing that a model folder brings is run: no remote code, no pickled weights, and nothing is reported to anybody.
"""

from __future__ import annotations

from typing import Any

from tigerbot.spec import ServeSpec

MAX_LOGPROBS = 20  # the gateway asks for no more
BLOCK = 128  # tokens of keys and values that vLLM takes at once on a CPU
_BYTES = {"float32": 4, "auto": 4}  # of a CPU's cache; others have two


def engine_args(spec: ServeSpec, config: Any, max_length: int) -> dict[str, Any]:
    """The fields of vLLM's `AsyncEngineArgs` for a spec whose model has this transformers config."""
    engine, gpus = spec.engine, spec.scale.gpus_per_replica
    assert engine.vllm is not None
    dtype = spec.members.dtype
    if dtype == "auto" and not gpus:
        dtype = "float32"
    cache_bytes = engine.vllm.kv_cache_bytes
    if cache_bytes is None and not gpus:
        cache_bytes = cache_need(config, engine.slots, max_length, _BYTES.get(dtype, 2))
    return {
        "model": spec.members.creative,
        "tokenizer": spec.members.creative,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",  # defaults are the gateway's, not the folder's
        "dtype": dtype,
        "seed": 0,
        "max_model_len": max_length,
        "max_num_seqs": engine.slots,
        # On a CPU the sampler of 0.32 and 0.33 breaks, and vLLM with it, on the seed of a prompt that is read in parts.
        "max_num_batched_tokens": engine.slots + (engine.prefill_chunk if gpus else max_length),
        "enable_chunked_prefill": gpus > 0,
        "enable_prefix_caching": engine.prefix_cache_bytes > 0,
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": engine.vllm.gpu_memory,
        "tensor_parallel_size": max(1, int(gpus)),
        "enforce_eager": not engine.vllm.compiled,
        "max_logprobs": MAX_LOGPROBS,
        "logprobs_mode": "raw_logprobs",  # the model's own: before temperature, penalties and masks
        "structured_outputs_config": {"backend": "guidance"},  # what compiles the gateway's grammars too
        "disable_log_stats": True,
    }


def environment(spec: ServeSpec) -> dict[str, str]:
    """What vLLM reads from its process's environment."""
    found = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a replica has threads, which a fork would not bring along
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not spec.scale.gpus_per_replica:
        found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # each replica would bind itself to the same cores
        if spec.scale.threads:
            found["OMP_NUM_THREADS"] = str(spec.scale.threads)
    return found


def cache_need(config: Any, slots: int, max_length: int, value_bytes: int) -> int:
    """Bytes of keys and values when every slot is full, and one block that vLLM keeps for itself."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    blocks = slots * -(-max_length // BLOCK) + 1
    return 2 * config.num_hidden_layers * kv_heads * width * value_bytes * blocks * BLOCK
