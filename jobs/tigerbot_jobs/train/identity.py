"""What a run's states are of. With another model, tokenizer or data they do not go on, and each difference has a name.

Shapes do not tell two models apart: with other heads, another activation or another rope theta the same tensors are
another function. So a state also knows its architecture's config, field by field, and a hash of the names, shapes and
dtypes of its parameters. The driver knows both before anything is started, from a model that takes no memory.

It imports torch only where a model is looked at: keepers, which have none, read checkpoints too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tigerbot.errors import IdentityError, ModelError, first_line
from tigerbot.spec import ModelSource, TrainSpec, flat

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of a config: where it came from, what a forward pass is to hand out, and what a model is stored as.
_NOT_THE_MODEL = frozenset(
    [
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)


def model_fields(model: Any) -> dict[str, Any]:
    """A causal LM's config, and `parameters`: a hash of their names, shapes and dtypes. Before an engine has it."""
    about = [[name, list(p.shape), str(p.dtype)] for name, p in model.named_parameters()]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return {"parameters": digest} | _plain(model.config.to_dict())


def fields_of(spec: TrainSpec) -> dict[str, Any]:
    """The `model_fields` of the model that a spec trains, without its weights; nothing where `path` is an adapter.

    Raises:
        ModelError: it has no config, or the tokenizer cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tigerbot.models import add_lora

    config = _config(spec.model)
    if config is None:
        return {}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if spec.lora:
            model = add_lora(model, spec.lora)
    return model_fields(model)


def check_same(kept: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Compare two identities. What one of them does not know, or knows as empty, is no difference.

    Raises:
        IdentityError: some fields differ; each is named.
    """
    before, after = flat(dict(kept)), flat(dict(now))
    differ = [
        f"{name} was {value}, now it is {after[name]}"
        for name, value in before.items()
        if name in after and value != after[name] and "" not in (value, after[name])
    ]
    if differ:
        fix = "resume it as it was, or --replace to begin anew"
        raise IdentityError("; ".join(differ), where=where, fix=fix)


def _config(source: ModelSource) -> PretrainedConfig | None:
    from transformers import AutoConfig

    from tigerbot.gguf import gguf_file
    from tigerbot.models import load_tokenizer, preset_config
    from tigerbot_jobs.train.model import tokenizer_folder

    if source.preset:
        return preset_config(source.preset, len(load_tokenizer(tokenizer_folder(source))))
    if source.gguf:
        file = gguf_file(source.gguf)
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    folder = source.path or source.hub or ""
    if (Path(folder) / "adapter_config.json").exists():
        return None
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"has no config ({first_line(error)})", where=folder, fix="give a Hugging Face folder"
        ) from None


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    kept = {name: _plain(v) if isinstance(v, dict) else v for name, v in config.items() if name not in _NOT_THE_MODEL}
    return json.loads(json.dumps(kept, default=str))
