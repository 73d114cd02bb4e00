"""The float32 master weights of a DeepSpeed checkpoint (ZeRO 0-3, any world size), put into a model.

DeepSpeed's own converter merges the shards, but it unpickles whatever it is given. Here every file is read with
`weights_only=True` and a short list of harmless classes, and then handed to DeepSpeed's merging functions.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tigerbot.errors import ModelError

# Wrappers put their own name before a model's: DistributedDataParallel, and a module that holds it.
_PREFIXES = ("", "module.", "model.", "module.model.", "base_model.model.")


def load_deepspeed_weights(model: Any, folder: str | Path) -> None:
    """Copy a checkpoint's float32 weights into a model, in place.

    Args:
        model: a causal LM of the checkpoint's shape.
        folder: what `save_checkpoint` wrote (its `latest` names the tag), or one tag's folder.

    Raises:
        ModelError: it is no DeepSpeed checkpoint, holds more than tensors and plain values, or does not fit the model.
    """
    found = _unwrapped(_state(_tag_folder(Path(folder)), str(folder)), set(model.state_dict()))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(set(mine) - set(found) - tied)
    misfits = [
        f"{name} is {tuple(found[name].shape)}" for name in mine if name in found and found[name].shape != mine[name]
    ]
    if missing or misfits:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"{misfits[0]}, the model wants another shape"
        raise ModelError(f"does not fit the model: {what}", where=str(folder), fix="name the model it was trained from")
    model.load_state_dict({name: found[name].float() for name in mine if name in found}, strict=False)
    model.tie_weights()


def _tag_folder(folder: Path) -> Path:
    latest = folder / "latest"
    tagged = folder / latest.read_text().strip() if latest.is_file() else folder
    if not list(tagged.glob("*_model_states.pt")):
        raise ModelError(
            "is not a DeepSpeed checkpoint (no *_model_states.pt)", where=str(folder), fix="give its folder"
        )
    return tagged


def _state(folder: Path, where: str) -> dict[str, Tensor]:
    from deepspeed.utils import zero_to_fp32 as merge

    models = [_read(Path(file)) for file in merge.get_model_state_files(str(folder))]
    shards = sorted(folder.glob("*_optim_states.pt"), key=lambda path: merge.natural_keys(path.name))
    zero = [_read(shard)["optimizer_state_dict"] for shard in shards]
    if not zero or "zero_stage" not in zero[0]:  # stage 0 keeps the weights whole
        return models[0]["module"]
    stage, partitions = int(zero[0]["zero_stage"]), zero[0]["partition_count"]
    world_size = max(partitions) if isinstance(partitions, list) else partitions
    if world_size != len(zero):
        raise ModelError(
            f"has the shards of {len(zero)} ranks, wants {world_size}", where=where, fix="copy the whole checkpoint"
        )
    about = [_about(model, merge.zero_model_state) for model in models]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [state[key] for state in zero]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if stage == 3:
                merged = merge._get_fp32_state_dict_from_zero3_checkpoint(world_size, flat, about, False)
            else:
                paddings = zero[0].get("param_alignment_paddings")
                merged = merge._get_fp32_state_dict_from_zero2_checkpoint(world_size, flat, about, False, paddings)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"cannot be put together ({error})", where=where, fix="copy the whole checkpoint"
            ) from None
        return merge.to_torch_tensor(merged)


def _about(model: dict[str, Any], kind: Any) -> Any:
    """What DeepSpeed's merging functions want to know of a rank's model file."""
    buffers = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
    return kind(
        buffers=buffers,
        param_shapes=model["param_shapes"],
        shared_params=[[alias, name] for alias, name in model["shared_params"].items()],
        ds_version=model.get("ds_version"),
        frozen_param_shapes=model.get("frozen_param_shapes"),
        frozen_param_fragments=model.get("frozen_param_fragments"),
    )


def _read(file: Path) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    harmless = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            "holds more than weights and is not loaded", where=str(file), fix="save it again with DeepSpeed 0.19"
        ) from None
    except (RuntimeError, EOFError):
        raise ModelError("is damaged", where=str(file), fix="copy it again") from None


def _unwrapped(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The state under the model's own names."""
    stripped = [
        {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        for prefix in _PREFIXES
    ]
    return max(stripped, key=lambda one: len(set(one) & names))
