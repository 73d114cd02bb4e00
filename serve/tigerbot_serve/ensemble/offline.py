"""Many prompts at once through both members by a replaceable rule, without slots, streams or deadlines.

For fitting and measuring: the rule sees what the members and the heads say about the next token of every row and gives
what to draw from. The served rule is `ServedRule`; others are a function away. Rows are padded on the left and stepped
until all of them have ended.

Legend: n rows, T tokens, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tigerbot.chat import encode_chat, end_token_ids
from tigerbot.models import load_model, load_tokenizer, model_hash, tokenizer_hash
from tigerbot.spec import DialSpec
from tigerbot.surprise import FADE
from tigerbot_serve.engine.sampler import sample
from tigerbot_serve.ensemble.dial import creative_weight, mix, temperature
from tigerbot_serve.ensemble.heads import Heads, load_heads
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL

Sides = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What is known about the next token of n rows. A side that does not run, and its head, are None.

    `said` are the answers so far, `setting` is the number that is turned.
    """

    setting: float
    creative_nV: Tensor | None
    factual_nV: Tensor | None
    p_div_n: Tensor | None
    p_dev_n: Tensor | None
    said: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Choice:
    """Log-probabilities to draw from, and how."""

    logprobs_nV: Tensor
    temperature_n: Tensor
    top_p: Sequence[float]


class Rule(Protocol):
    """How a next token is chosen at a setting. `floor` is the plausibility mask's."""

    floor: float

    def sides(self, setting: float) -> Sides: ...

    def __call__(self, view: View) -> Choice: ...


class ServedRule:
    """The dial as it is served: the formula of `ensemble/dial.py` with a spec's numbers."""

    def __init__(self, spec: DialSpec) -> None:
        self._spec, self.floor = spec, spec.plausibility

    def sides(self, setting: float) -> Sides:
        return (FACTUAL,) if setting <= 0 else (CREATIVE,) if setting >= 1 else (CREATIVE, FACTUAL)

    def __call__(self, view: View) -> Choice:
        rows_nV = view.factual_nV if view.creative_nV is None else view.creative_nV
        assert rows_nV is not None
        dial_n = torch.full((len(rows_nV),), view.setting)
        w_n = creative_weight(dial_n, view.p_div_n, view.p_dev_n, self._spec)
        if view.creative_nV is not None and view.factual_nV is not None:
            rows_nV = mix(view.creative_nV, view.factual_nV, w_n, self._spec)
        tied_n = temperature(w_n, torch.full_like(w_n, float("nan")), self._spec)
        return Choice(rows_nV, tied_n, [1.0] * len(rows_nV))


class Pair:
    """Two experts, each a whole model, with their heads.

    Raises:
        ModelError: a folder is missing, or the heads are of other models.
    """

    def __init__(self, creative: str, factual: str, heads: str | None) -> None:
        self.tokenizer: Any = load_tokenizer(factual)
        self._models = [_merged(creative), _merged(factual)]
        self.ends = torch.tensor(end_token_ids(self.tokenizer))
        self.heads: Heads | None = None
        if heads is not None:
            hashes = {"creative_hash": model_hash(creative), "factual_hash": model_hash(factual)}
            hashes["tokenizer_hash"] = tokenizer_hash(factual)
            self.heads = load_heads(heads, hashes, self._models[FACTUAL].config.hidden_size)

    def prompt(self, text: str) -> list[int]:
        """A user's message up to where the answer begins."""
        return encode_chat(self.tokenizer, [{"role": "user", "content": text}], generation_prompt=True)[0]

    def answers(self, prompts: Sequence[str], rule: Rule, setting: float, seed: int, tokens: int) -> list[str]:
        """One answer to every prompt; the same seed gives the same answers."""
        ids = [self.prompt(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        found = [""] * len(ids)
        for at in range(0, len(order), 256):
            rows = order[at : at + 256]
            for row, said in zip(
                rows, self._decoded([ids[row] for row in rows], rule, setting, seed, tokens), strict=True
            ):
                found[row] = self.tokenizer.decode(said)
        return found

    @torch.inference_mode()
    def _decoded(self, prompts: list[list[int]], rule: Rule, setting: float, seed: int, tokens: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        fed_nT, mask_nT = _padded(prompts)
        sides = rule.sides(setting)
        caches: list[Any] = [None, None]
        said: list[list[int]] = [[] for _ in prompts]
        alive_n, surprise_n = torch.ones(len(prompts), dtype=torch.bool), torch.zeros(len(prompts))
        for _ in range(tokens):
            hidden: list[Any] = [None, None]
            logprobs: list[Any] = [None, None]
            for side in sides:
                hidden[side], logprobs[side], caches[side] = self._step(side, fed_nT, mask_nT, caches[side])
            p_div_n, p_dev_n = self._read(hidden, surprise_n)
            view = View(setting, logprobs[CREATIVE], logprobs[FACTUAL], p_div_n, p_dev_n, said)
            choice = rule(view)
            uniform_n = torch.rand(len(prompts), generator=generator, dtype=torch.float64)
            ids_n = sample(choice.logprobs_nV, choice.temperature_n, choice.top_p, uniform_n, floor=rule.floor)
            expecting_nV = logprobs[FACTUAL] if logprobs[FACTUAL] is not None else choice.logprobs_nV
            surprise_n = torch.maximum(-expecting_nV.gather(1, ids_n[:, None])[:, 0], FADE * surprise_n)
            alive_n &= ~torch.isin(ids_n, self.ends)
            for row in alive_n.nonzero()[:, 0].tolist():
                said[row].append(int(ids_n[row]))
            if not alive_n.any():
                break
            fed_nT = ids_n[:, None]
            mask_nT = torch.cat([mask_nT, torch.ones(len(prompts), 1, dtype=torch.long)], dim=1)
        return said

    def _step(self, side: int, fed_nT: Tensor, mask_nT: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any]:
        """Last hidden states (n, d), log-probabilities (n, V) and the cache."""
        model = self._models[side]
        positions_nT = (mask_nT.cumsum(1) - 1).clamp(min=0)[:, -fed_nT.shape[1] :]
        made = model.model(
            input_ids=fed_nT,
            attention_mask=mask_nT,
            position_ids=positions_nT,
            past_key_values=cache,
            use_cache=True,
        )
        last_nd = made.last_hidden_state[:, -1]
        return last_nd, torch.log_softmax(model.lm_head(last_nd).float(), dim=-1), made.past_key_values

    def _read(self, hidden: Sequence[Any], surprise_n: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """p_div and p_dev of every row."""
        creative_nd, factual_nd = hidden
        if self.heads is None:
            return None, None
        p_div_n = None if creative_nd is None else self.heads.p_div(creative_nd)
        if factual_nd is None:
            return p_div_n, None
        return p_div_n, self.heads.p_dev(torch.cat([factual_nd.float(), surprise_n[:, None]], dim=1))


def _merged(folder: str) -> Any:
    model = load_model(folder, "float32")
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left, where a row's last token then stands in the last column."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(list(row))
        mask[index, longest - len(row) :] = 1
    return ids, mask
