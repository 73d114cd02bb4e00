"""fp16's dynamic loss scale: the counters of DeepSpeed 0.19.8's scaler, which belong to a state like its moments.

A run that lost them would begin again at the first scale, and leave out steps until it has found the right one. ZeRO 1-3
have a `loss_scaler`, stage 0 a `loss_scale_config` without hysteresis; where the stage changes, what both know goes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEPT = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_scale(engine: Any) -> dict[str, float]:
    """The scaler's counters, as JSON; nothing where the scale is fixed or there is none."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _KEPT if hasattr(scaler, name)}


def write_scale(engine: Any, kept: Mapping[str, float]) -> None:
    """Put counters back that `read_scale` gave; a scaler that none were kept for stays as it is."""
    scaler = _scaler(engine)
    for name, value in kept.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def left_out(engine: Any) -> bool:
    """Whether the last step was not made, because its gradients at this scale were no numbers."""
    return _scaler(engine) is not None and bool(engine.optimizer.overflow)


def _scaler(engine: Any) -> Any:
    """The one whose scale moves."""
    optimizer = engine.optimizer
    found = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    dynamic = getattr(found, "dynamic", False) or getattr(found, "dynamic_loss_scale", False)
    return found if dynamic else None
