"""The models of an ensemble behind one face: feed rows of each side, get each side's hidden states.

Two LoRA experts of one base share its weights and step as one batch; two full models step one after the other; one
model alone takes every row, whatever the dial. This module knows nothing about the dial, the heads or sampling.

Legend: R rows, T new tokens a row, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tigerbot.errors import ModelError
from tigerbot.models import base_of, load_model, load_tokenizer, model_hash, tokenizer_hash
from tigerbot.spec import MembersSpec
from tigerbot_serve.engine.kv_cache import KVCache
from tigerbot_serve.ensemble.lora import Split, pair_adapters

CREATIVE, FACTUAL = 0, 1


@dataclass(frozen=True)
class Feed:
    """Rows of one side: new token ids (R, T) and the position each row's first one has."""

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]


NOTHING = Feed((), ())


@dataclass(frozen=True)
class Stack:
    """One transformers model and the sides whose rows it takes."""

    model: Any
    sides: tuple[int, ...]
    split: Split | None = None


class Caches:
    """The key-value caches of all stacks, addressed by side."""

    def __init__(self, stacks: Sequence[Stack], rows: int, max_length: int) -> None:
        self.of_stack = [
            KVCache(
                stack.model.config,
                rows if CREATIVE in stack.sides else 0,
                rows if FACTUAL in stack.sides else 0,
                max_length,
                stack.model.dtype,
                str(stack.model.device),
            )
            for stack in stacks
        ]
        self._of_side = {side: self.of_stack[i] for i, stack in enumerate(stacks) for side in stack.sides}

    def copy(self, source: Caches, side: int, from_index: int, to_index: int, length: int) -> None:
        """Take row `from_index` of a side of `source` as this one's `to_index`."""
        mine, theirs = self._of_side[side], source._of_side[side]
        mine.copy_row(theirs, theirs.row(side, from_index), mine.row(side, to_index), length)


class Members:
    """One or two models with one vocabulary.

    Attributes:
        hashes: creative_hash, factual_hash, tokenizer_hash.
        alone: there is one model and no dial.
    """

    def __init__(self, stacks: Sequence[Stack], tokenizer: Any, hashes: dict[str, str]) -> None:
        self.stacks, self.tokenizer, self.hashes = tuple(stacks), tokenizer, hashes
        self.alone = sum(len(stack.sides) for stack in stacks) == 1
        self._heads = {side: stack.model.lm_head for stack in stacks for side in stack.sides}
        configs = [stack.model.config for stack in stacks]
        self.width: int = configs[0].hidden_size
        self.vocab_size: int = configs[0].vocab_size
        self.max_positions: int = min(config.max_position_embeddings for config in configs)
        self.device = str(stacks[0].model.device)
        for config in configs[1:]:
            if config.vocab_size != self.vocab_size:
                raise ModelError(
                    f"members have {self.vocab_size} and {config.vocab_size} outputs",
                    where="members",
                    fix="serve members of one vocabulary",
                )

    def sides(self, dial: float) -> tuple[int, ...]:
        """Whose rows a sequence needs: at the ends of the dial only one member runs."""
        if self.alone or dial >= 1:
            return (CREATIVE,)
        return (FACTUAL,) if dial <= 0 else (CREATIVE, FACTUAL)

    def caches(self, rows: int, max_length: int) -> Caches:
        """Room for `rows` rows of each side."""
        return Caches(self.stacks, rows, max_length)

    def forward(self, caches: Caches, feeds: tuple[Feed, Feed]) -> tuple[Tensor | None, Tensor | None]:
        """Feed both sides' rows; gives their final normed hidden states (R, T, d), None for a side with no rows.

        Row i of a side is the one `len(rows) - 1 - i` out from the middle for creative rows, i for factual ones.
        """
        hidden: list[Tensor | None] = [None, None]
        for stack, cache in zip(self.stacks, caches.of_stack, strict=True):
            mine = [feeds[side] if side in stack.sides else NOTHING for side in (CREATIVE, FACTUAL)]
            counts = [len(feed.starts) for feed in mine]
            if not sum(counts):
                continue
            out_RTd = _forward(stack, cache, mine, counts)
            for side, part_RTd in enumerate(out_RTd.split(counts)):
                if counts[side]:
                    hidden[side] = part_RTd.to(self.device)
        return hidden[0], hidden[1]

    def log_probabilities(self, side: int, hidden_Rd: Tensor) -> Tensor:
        """Natural log-probabilities (R, V), float32."""
        head = self._heads[side]
        return torch.log_softmax(head(hidden_Rd.to(head.weight.device)).float(), dim=-1).to(self.device)


def _forward(stack: Stack, cache: KVCache, feeds: Sequence[Feed], counts: Sequence[int]) -> Tensor:
    ids_RT = torch.tensor([*feeds[0].ids, *feeds[1].ids], device=stack.model.device)
    starts = [*feeds[0].starts, *feeds[1].starts]
    positions_RT, mask_R1TL = cache.begin(counts[0], counts[1], starts, ids_RT.shape[1])
    if stack.split is not None:
        stack.split.begin(counts[0], counts[1])
    return stack.model.model(
        input_ids=ids_RT,
        attention_mask=mask_R1TL,
        position_ids=positions_RT,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def load_members(spec: MembersSpec, device: str = "cpu") -> Members:
    """Load what the spec names.

    Raises:
        ModelError: a folder is missing, tokenizers or bases differ, or a model is not Llama-like.
    """
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
    bases = [_base(folder, spec.base) for folder in folders.values()]
    if len(folders) == 2 and all(bases) and model_hash(bases[0]) == model_hash(bases[1]):  # type: ignore[arg-type]
        stacks = [_paired(bases[0], folders["creative"], folders["factual"], spec.dtype, device)]
    else:
        stacks = [
            Stack(_full(folder, base, spec.dtype, spec.devices[side] if spec.devices else device), (side,))
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


def _paired(base: Path | None, creative: Path, factual: Path, dtype: str, device: str) -> Stack:
    model = _ready(load_model(str(base), dtype), base, device)
    return Stack(model, (CREATIVE, FACTUAL), pair_adapters(model, creative, factual))


def _full(folder: Path, base: Path | None, dtype: str, device: str) -> Any:
    if base is None:
        return _ready(load_model(folder, dtype), folder, device)
    from peft import PeftModel

    return _ready(PeftModel.from_pretrained(load_model(base, dtype), str(folder)).merge_and_unload(), folder, device)


def _ready(model: Any, folder: Path | None, device: str) -> Any:
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ModelError(
            f"is a {type(model).__name__}, not a Llama-like model", where=str(folder), fix="serve a decoder"
        )
    model.set_attn_implementation("sdpa")
    return model.to(device).eval().requires_grad_(False)
