"""What a spec may ask of vLLM: refused in one line on the driver, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tigerbot.errors import InputError, SpecError
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.adapters import vllm_checks
from tigerbot_serve.adapters.vllm_checks import check_vllm
from tigerbot_serve.adapters.vllm_settings import BLOCK, cache_need, engine_args, environment
from tigerbot_serve.deploy.endpoint import version_to_serve
from tigerbot_serve.gateway.keys import KeyRing

SMALL = LlamaConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def spec_of(**fields: Any) -> ServeSpec:
    engine = {"vllm": {}} | fields.pop("engine", {})
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "c"}, "engine": engine} | fields)
    assert isinstance(spec, ServeSpec)
    return spec


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_checks, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("members.factual", {"members": {"creative": "c", "factual": "f"}}),
        ("members.base", {"members": {"creative": "c", "base": "b"}}),
        ("members.dtype", {"members": {"creative": "c", "dtype": "int8"}}),
        ("heads", {"heads": "h"}),
        ("canary", {"canary": {"members": {"creative": "d"}}}),
        ("plugins", {"plugins": [{"name": "calculator"}]}),
        ("engine.gate", {"engine": {"gate": {}}}),
        ("engine.speculate", {"engine": {"speculate": {}}}),
        ("engine.public_prefix", {"engine": {"public_prefix": "Be brief."}}),
        ("scale.gpus_per_replica", {"scale": {"gpus_per_replica": 1.5}}),
    ],
)
def test_what_only_our_own_engine_does_is_refused_with_its_field(installed, field, asked) -> None:
    with pytest.raises(SpecError) as refusal:
        check_vllm(spec_of(**asked))

    line = str(refusal.value)
    assert line.startswith(f"engine.vllm, {field}: ") and "vLLM serves one model alone" in line
    assert refusal.value.exit_code == 2 and "\n" not in line


def test_an_adapter_folder_is_to_be_merged_first(installed, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(SpecError, match=r"members\.creative: this is an adapter.*tiger export"):
        check_vllm(spec_of(members={"creative": str(tmp_path)}))


def test_without_vllm_a_spec_that_wants_it_is_told_how_to_install_it(monkeypatch, world) -> None:
    monkeypatch.setattr(vllm_checks, "find_spec", lambda name: None)

    with pytest.raises(
        InputError, match=r"engine\.vllm: vLLM is not installed; run bash scripts/setup-vllm"
    ) as refusal:
        version_to_serve(spec_of(members={"creative": str(world.base)}), KeyRing(), Path("run"), port=1)

    assert refusal.value.exit_code == 2


def test_a_spec_without_it_asks_for_no_vllm(monkeypatch) -> None:
    monkeypatch.setattr(vllm_checks, "find_spec", lambda name: None)

    check_vllm(spec_of(engine={"vllm": None}, heads="h"))


def test_one_model_alone_is_taken(installed) -> None:
    check_vllm(spec_of(scale={"gpus_per_replica": 2}))


def test_nothing_that_a_model_folder_brings_is_run_or_reported() -> None:
    spec = spec_of(scale={"threads": 2})

    args, env = engine_args(spec, SMALL, 512), environment(spec)

    assert args["trust_remote_code"] is False and args["load_format"] == "safetensors"
    assert args["generation_config"] == "vllm" and args["structured_outputs_config"] == {"backend": "guidance"}
    assert env["VLLM_NO_USAGE_STATS"] == "1" and env["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
    assert env["OMP_NUM_THREADS"] == "2"


def test_the_engine_section_holds_for_vllm_too() -> None:
    engine = {"slots": 8, "prefill_chunk": 100, "prefix_cache_bytes": 0, "vllm": {"gpu_memory": 0.5, "compiled": False}}
    spec = spec_of(engine=engine, members={"creative": "c", "dtype": "bfloat16"}, scale={"gpus_per_replica": 2})

    args = engine_args(spec, SMALL, 300)

    assert (args["max_num_seqs"], args["max_model_len"], args["max_num_batched_tokens"]) == (8, 300, 108)
    assert args["enable_prefix_caching"] is False and args["enforce_eager"] is True
    assert (args["tensor_parallel_size"], args["gpu_memory_utilization"], args["dtype"]) == (2, 0.5, "bfloat16")
    assert args["kv_cache_memory_bytes"] is None


def test_on_a_cpu_a_prompt_is_read_whole() -> None:
    args = engine_args(spec_of(engine={"slots": 4, "prefill_chunk": 16}), SMALL, 300)

    assert (args["enable_chunked_prefill"], args["max_num_batched_tokens"]) == (False, 304)


def test_on_a_cpu_the_cache_holds_what_the_slots_need() -> None:
    args = engine_args(spec_of(engine={"slots": 3}), SMALL, 300)

    blocks = 3 * 3 + 1  # 300 tokens take three blocks of 128
    assert args["dtype"] == "float32"
    assert args["kv_cache_memory_bytes"] == cache_need(SMALL, 3, 300, 4) == blocks * BLOCK * (2 * 2 * 2 * 64 * 4)
