"""From the folders that a spec names to members: whose base is whose, and what refuses to be served together.

Two adapters of one base become one stack, in which its weights are once; anything else is a model a side, with its
adapter merged into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tigerbot.errors import ModelError
from tigerbot.models import base_of, load_model, load_tokenizer, model_hash, tokenizer_hash
from tigerbot.spec import MembersSpec
from tigerbot_serve.ensemble.decoder import LlamaDecoder, llama_like
from tigerbot_serve.ensemble.lora import Adapters
from tigerbot_serve.ensemble.matrix import Matrix, matrix
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, Members, Stack
from tigerbot_serve.ensemble.stock import StockDecoder


def quantisation(dtype: str) -> str:
    """What heads were trained on, beside the weights: states of int8 weights are others."""
    return "int8" if dtype == "int8" else "none"


def load_members(spec: MembersSpec, device: str = "cpu") -> Members:
    """Load what the spec names.

    Raises:
        ModelError: a folder is missing, tokenizers or bases differ, a model is no decoder, or int8 is asked of a GPU.
    """
    if spec.dtype == "int8" and device != "cpu":
        raise ModelError("int8 is for CPUs", where="members.dtype", fix="use bfloat16 on a GPU")
    folders = {"creative": Path(spec.creative)} | ({"factual": Path(spec.factual)} if spec.factual else {})
    for role, folder in folders.items():
        if not folder.is_dir():
            raise ModelError("there is no such folder", where=f"members.{role}: {folder}", fix="give a model folder")
    tokenizers = {role: _tokenizer_hash(folder) for role, folder in folders.items()}
    if len(set(tokenizers.values())) > 1:
        raise ModelError(
            f"tokenizers differ (creative {tokenizers['creative']}, factual {tokenizers['factual']})",
            where=f"members: {spec.creative}, {spec.factual}",
            fix="serve members made with one tokenizer",
        )
    hashes = {f"{role}_hash": model_hash(folder) for role, folder in folders.items()}
    hashes["tokenizer_hash"] = tokenizers["creative"]
    hashes["quantisation"] = quantisation(spec.dtype)
    bases = [_base(folder, spec.base) for folder in folders.values()]
    shared = bases[0]
    if len(bases) == 2 and shared and bases[1] and model_hash(shared) == model_hash(bases[1]):
        stacks = [_paired(shared, folders["creative"], folders["factual"], spec.dtype, device)]
    else:
        stacks = [
            _alone(folder, base, side, spec.dtype, spec.devices[side] if spec.devices else device)
            for side, (folder, base) in enumerate(zip(folders.values(), bases, strict=True))
        ]
    return Members(stacks, load_tokenizer(folders["creative"]), hashes)


def _tokenizer_hash(folder: Path) -> str:
    if not (folder / "tokenizer.json").is_file():
        raise ModelError("has no tokenizer.json", where=str(folder), fix="save the tokenizer beside the weights")
    return tokenizer_hash(folder)


def _base(folder: Path, given: str | None) -> Path | None:
    """The base of an adapter folder, None of a full model."""
    if not (folder / "adapter_config.json").is_file():
        return None
    if given is not None and not Path(given).is_dir():
        raise ModelError(
            "there is no such folder", where=f"members.base: {given}", fix="give the adapters' base folder"
        )
    if not (folder / "tiger.json").is_file():
        if given is None:
            raise ModelError("does not say what its base is", where=str(folder), fix="name it in members.base")
        return Path(given)
    base = base_of(folder)
    if given is not None and model_hash(given) != model_hash(base):
        raise ModelError(f"was made on another base than {given}", where=str(folder), fix=f"its base is {base}")
    return base


def _paired(base: Path, creative: Path, factual: Path, dtype: str, device: str) -> Stack:
    adapters = Adapters(creative, factual)
    model = _loaded(base, None, dtype, device)
    adapters.check(model)
    return _stack(model, (CREATIVE, FACTUAL), dtype, adapters)


def _alone(folder: Path, base: Path | None, side: int, dtype: str, device: str) -> Stack:
    model = _loaded(folder, None, dtype, device) if base is None else _loaded(base, folder, dtype, device)
    return _stack(model, (side,), dtype)


def _loaded(folder: Path, adapter: Path | None, dtype: str, device: str) -> Any:
    """The model of a folder, with an adapter merged into it."""
    model = load_model(str(folder), "float32" if dtype == "int8" else dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ModelError(
            f"is a {type(model).__name__}, not a Llama-like model", where=str(folder), fix="serve a decoder"
        )
    return model.to(device).eval().requires_grad_(False)


def _stack(model: Any, sides: tuple[int, ...], dtype: str, adapters: Adapters | None = None) -> Stack:
    outputs = _outputs(model.lm_head, len(sides), adapters)
    if llama_like(model):
        return Stack(LlamaDecoder(model, adapters, int8=dtype == "int8"), sides, outputs)
    if dtype == "int8":
        raise ModelError(
            f"int8 is for Llama-like models, this is a {type(model).__name__}",
            where="members.dtype",
            fix="use float32",
        )
    return Stack(StockDecoder(model, adapters), sides, outputs)


def _outputs(head: Any, sides: int, adapters: Adapters | None) -> tuple[Matrix, ...]:
    """Each side's output matrix, in the model's own dtype: one for both, unless an expert adapts it."""
    own = adapters.of("lm_head") if adapters else ()
    if not any(own):
        return (matrix([head.weight], [head.bias]),) * sides
    merged = [head.weight if one is None else head.weight + (one[1] @ one[0]).to(head.weight) for one in own]
    return tuple(matrix([weight_Vd], [head.bias]) for weight_Vd in merged)
