"""DeepSpeed's config of a run: what the train section decides, with the spec's own keys over it."""

from __future__ import annotations

import copy
from typing import Any

from tigerbot.errors import SpecError
from tigerbot.spec import TrainLoop
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.deepspeed_keys import check_keys


def deepspeed_config(
    loop: TrainLoop, given: dict[str, Any], plan: BatchPlan, *, parameters: int, bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's config: ours, with the spec's own keys over it.

    Raises:
        SpecError: a stage that does not exist, or a key that DeepSpeed does not have or this loop decides.
    """
    check_keys(given)
    given = copy.deepcopy(given)
    stated = given.get("zero_optimization", {}).get("stage", given.get("zero_stage", 2))
    stage = given.pop("zero_stage", stated)
    if stage not in (0, 1, 2, 3):
        raise SpecError(f"got {stage!r}, wants 0, 1, 2 or 3", where="deepspeed.zero_stage", fix="name one of these")
    if stage != stated:
        what = f"says {stage}, and zero_optimization.stage says {stated}"
        raise SpecError(what, where="deepspeed.zero_stage", fix="name the stage once")
    ours = {
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.micro_steps,
        "gradient_clipping": loop.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "managed_gradient_accumulation": True,
        "steps_per_print": 10**9,
    }
    decided = sorted({*ours, "train_batch_size", "optimizer", "scheduler"} & set(given))
    if decided:
        raise SpecError(f"{', '.join(decided)}: set by the train section", where="deepspeed", fix="remove it here")
    # DeepSpeed's default buckets are 2 GB whatever the model's size.
    bucket = min(500_000_000, max(parameters, 1))
    zero = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    zero |= given.pop("zero_optimization", {})
    # torch's fused AdamW runs on a CPU too: what is offloaded needs no other optimizer.
    default = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "zero_force_ds_cpu_optimizer": False}
    return ours | default | given
