"""The forward pass of a decoder that is not Llama-like: transformers' own, over our cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tigerbot_serve.engine.kv_cache import KVCache
from tigerbot_serve.ensemble.lora import Adapters, Split
from tigerbot_serve.ensemble.twins import Twins


class StockDecoder:
    """A transformers model as it is; two experts' updates are put into its linears, in place."""

    shares_layers = False

    def __init__(self, model: Any, adapters: Adapters | None = None) -> None:
        self._model, self._adapters = model, adapters
        self.config, self.dtype, self.device = model.config, model.dtype, str(model.device)
        model.set_attn_implementation("sdpa")
        for name in adapters.names if adapters else ():
            parent, _, leaf = name.rpartition(".")
            linear = model.get_submodule(name)
            assert adapters is not None
            if parent:  # the output matrix is the members' business
                setattr(model.get_submodule(parent), leaf, adapters.paired(linear, {name: linear}))

    @property
    def split(self) -> Split | None:
        """Which rows of a step are whose; None where there is nothing to tell apart."""
        return self._adapters.split if self._adapters else None

    def forward(self, cache: KVCache, ids_RT: Tensor, counts: Sequence[int], twins: Twins | None) -> Tensor:
        """Final normed states (R, T, d) of the step that `cache.begin` has begun."""
        if self._adapters is not None:
            self._adapters.split.begin(*counts)
        return self._model.model(
            input_ids=ids_RT,
            attention_mask=cache.mask(),
            position_ids=cache.positions_RT,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
