"""A causal LM as the loop sees it: packed token ids in, the sum of the token losses out.

Shapes: n sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tigerbot.deepspeed_weights import load_deepspeed_weights
from tigerbot.errors import ModelError
from tigerbot.models import add_lora, build, load_model, load_tokenizer
from tigerbot.spec import ModelSource, TrainSpec
from tigerbot.tokens import IGNORE
from tigerbot_jobs.train.loss import output_loss

# Models that change their logits after the output matrix must be asked for logits.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class LanguageModel(nn.Module):
    """Wraps a Hugging Face causal LM (with or without peft adapters).

    Args:
        model: the causal LM.
        autocast: run the decoder's matrices in this dtype; None: in the weights' own.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast
        if autocast is not None:
            _rotate_in(autocast, model)
        self._whole = any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES)
        self._output_loss = None if self._whole else output_loss(_base(model).get_output_embeddings())

    def forward(self, ids_nT: Tensor, labels_nT: Tensor, positions_nT: Tensor) -> Tensor:
        """Sum of the cross-entropies of the labels that count, float32."""
        # One document a sequence is plain causal attention, which needs no mask and has a faster kernel; its positions
        # are the same in every row.
        alone = bool((positions_nT[:, 1:] > 0).all())
        mask_n1TT = None if alone else packed_mask(positions_nT)
        targets = labels_nT[:, 1:]
        counted = targets != IGNORE
        with torch.autocast(ids_nT.device.type, self._autocast or torch.float32, enabled=self._autocast is not None):
            base = _base(self.model)
            inputs = {
                "input_ids": ids_nT,
                "position_ids": positions_nT[:1] if alone else positions_nT,
                "attention_mask": mask_n1TT,
                "use_cache": False,
            }
            if self._whole:
                logits_xV = self.model(**inputs).logits[:, :-1][counted]
            else:
                # Only positions that carry loss meet the output matrix: for chat data that is a small part of them.
                hidden_nTD = base.get_decoder()(**inputs).last_hidden_state[:, :-1]
                hidden_xD = hidden_nTD.flatten(0, 1) if bool(counted.all()) else hidden_nTD[counted]
                if self._output_loss is not None:
                    return self._output_loss(hidden_xD, targets[counted])
                logits_xV = base.get_output_embeddings()(hidden_xD)
        return nn.functional.cross_entropy(logits_xV.float(), targets[counted], reduction="sum")


def _base(model: Any) -> Any:
    """The causal LM under its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _rotate_in(dtype: torch.dtype, model: Any) -> None:
    """Turn queries and keys in the dtype of the matrices they come out of, as models in that dtype do on a GPU.

    Under autocast the angles are float32, and would lift every query and key of every layer to float32 and back.
    """
    rotary = getattr(_base(model).get_decoder(), "rotary_emb", None)
    if rotary is not None:
        rotary.register_forward_hook(lambda module, inputs, angles: tuple(part.to(dtype) for part in angles))


def packed_mask(positions_nT: Tensor) -> Tensor:
    """Who may look at whom, (n, 1, T, T) bool: earlier tokens of the same document; positions begin anew at each."""
    documents_nT = (positions_nT == 0).cumsum(1)
    same_nTT = documents_nT[:, :, None] == documents_nT[:, None, :]
    return same_nTT.tril()[:, None]


def tokenizer_folder(source: ModelSource) -> str:
    """Where a model's tokenizer is.

    Raises:
        ModelError: a preset has none of its own, and the spec names none.
    """
    folder = source.tokenizer or source.path or source.hub or source.gguf
    if not folder:
        raise ModelError("a preset has no tokenizer", where="model.tokenizer", fix="name the corpus' tokenizer folder")
    return folder


def make_model(spec: TrainSpec) -> Any:
    """The causal LM of a spec, in float32, with its adapters.

    Raises:
        ModelError: the tokenizer has more tokens than the model, or the model cannot be loaded.
    """
    tokenizer = load_tokenizer(tokenizer_folder(spec.model))
    preset = spec.model.preset
    model: Any = build(preset, len(tokenizer), spec.train.seed) if preset else load_model(spec.model)
    if spec.model.weights:
        load_deepspeed_weights(model, spec.model.weights)
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {known}",
            where=tokenizer_folder(spec.model),
            fix="use the tokenizer this model was made with",
        )
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if spec.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.train.seed)
            model = add_lora(model, spec.lora)
    return model


def base_folder(spec: TrainSpec) -> Path | None:
    """The folder an adapter of this spec belongs to."""
    return Path(spec.model.path) if spec.lora and spec.model.path else None
