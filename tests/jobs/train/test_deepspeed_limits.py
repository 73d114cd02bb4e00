"""What DeepSpeed cannot do here is said on the driver, in one line; what it can passes."""

from __future__ import annotations

from typing import Any

import pytest
from refused_keys import REFUSED, Refused, zero

from tigerbot.errors import SpecError
from tigerbot.spec import TrainLoop
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.deepspeed_config import deepspeed_config
from tigerbot_jobs.train.deepspeed_keys import (
    BF16_KEYS,
    FP16_KEYS,
    KEYS,
    OFFLOAD_OPTIMIZER_KEYS,
    OFFLOAD_PARAM_KEYS,
    ZERO_KEYS,
)
from tigerbot_jobs.train.deepspeed_limits import check_limits


def check(keys: dict[str, Any], *, on_gpu: bool = False, bf16: bool = False) -> None:
    plan = BatchPlan(sequences=8, micro=2, micro_steps=4, steps=1)
    config = deepspeed_config(TrainLoop(tokens=1), keys, plan, parameters=10, bf16=bf16)
    check_limits(config, on_gpu=on_gpu)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_done_is_refused_with_its_place_and_a_way_out(case: Refused) -> None:
    with pytest.raises(SpecError) as refused:
        check(case.keys, on_gpu=case.on_gpu)

    line = str(refused.value)
    assert refused.value.where.endswith(case.where) and case.said in line and "\n" not in line
    assert refused.value.fix and refused.value.exit_code == 2


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_what_can_be_done_passes(stage: int, on_gpu: bool) -> None:
    check({"zero_stage": stage}, on_gpu=on_gpu, bf16=on_gpu)
    check(zero(stage, sub_group_size=1e6, overlap_comm=True) | {"zero_stage": stage}, on_gpu=on_gpu, bf16=on_gpu)
    if stage:
        check(zero(stage, offload_optimizer={"device": "cpu"}), on_gpu=on_gpu, bf16=on_gpu)
    if on_gpu:
        check({"zero_stage": stage, "fp16": {"enabled": True, "loss_scale": 0}}, on_gpu=True)


def test_half_precision_gradients_of_zero_1_are_refused_where_the_train_section_says_bf16() -> None:
    keys = zero(1) | {"data_types": {"grad_accum_dtype": "fp32"}}

    check(keys, on_gpu=True)
    with pytest.raises(SpecError, match="ZeRO 1 with bf16 weights and fp32 gradients"):
        check(keys, on_gpu=True, bf16=True)


def test_the_names_of_deepspeeds_keys_are_those_of_the_installed_one() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections: list[tuple[Any, frozenset[str]]] = [
        (DeepSpeedZeroConfig, ZERO_KEYS),
        (DeepSpeedBF16Config, BF16_KEYS),
        (DeepSpeedFP16Config, FP16_KEYS),
        (DeepSpeedZeroOffloadParamConfig, OFFLOAD_PARAM_KEYS),
        (DeepSpeedZeroOffloadOptimizerConfig, OFFLOAD_OPTIMIZER_KEYS),
    ]

    for section, known in sections:
        fields = section.model_fields
        assert set(fields) | {field.alias for field in fields.values() if field.alias} == known
    assert {"zero_optimization", "bf16", "communication_data_type", "activation_checkpointing"} < KEYS
    assert not KEYS & set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
