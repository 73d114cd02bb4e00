"""From a request to the fields of vLLM's `SamplingParams`, and from its log-probabilities to ours. Needs no vLLM.

What differs from our own engine: a repetition penalty works on logits (as in its paper), ours on log-probabilities; and
a seed means another text, since another generator draws. The rest is said in vLLM's words without loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from tigerbot_serve.engine.request import Request
from tigerbot_serve.engine.steer import BAN

BANNED = -1e4  # below every other score, and still a number: where nothing else is left, a banned token is drawn
Tops = tuple[tuple[int, float], ...]


def sampling_fields(
    request: Request,
    *,
    temperature: float,
    max_tokens: int,
    end_ids: Collection[int],
    eos_id: int | None,
    vocab_size: int,
    floor: float,
) -> dict[str, Any]:
    """The fields of `SamplingParams` that a request comes to.

    Text, stop texts and the end of a grammar are followed on our side of the border, as for our own engine; so vLLM is
    asked for token ids, and its request is ended when the text is.

    Args:
        temperature: the request's own or the dial's.
        max_tokens: what the request wants and fits; 0 for the prompt's log-probabilities alone.
        end_ids: tokens that end a turn.
        eos_id: the one of them that vLLM allows at the end of a grammar by itself.
        floor: the dial's plausibility. It is a share before temperature, vLLM's `min_p` one after it.
    """
    min_p = request.min_p
    if temperature > 0 and floor > 0:
        min_p = max(min_p, floor ** (1 / temperature))
    biases = {token: BANNED if bias <= BAN else bias for token, bias in request.logit_bias if token < vocab_size}
    others = sorted(set(end_ids) - {eos_id})
    return {
        "n": 1,  # every one of the gateway's n answers is a request with a seed of its own
        "max_tokens": max(1, max_tokens),
        "temperature": temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": min_p,
        "seed": None if request.seed is None else request.seed % 2**63,  # vLLM takes -1 for none
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": biases or None,
        "logprobs": request.logprobs,
        "prompt_logprobs": request.prompt_logprobs,
        "stop_token_ids": sorted(end_ids),
        "detokenize": False,
        "structured_outputs": None if request.grammar is None else lark_of(request.grammar.source, others),
    }


def lark_of(source: str, end_ids: Collection[int]) -> str:
    """A grammar's source as Lark whose text may also end with one of these tokens.

    vLLM lets a grammar end with the tokenizer's one end token; a turn of ours may end with another.
    """
    if source.lstrip().startswith("{"):
        schema = json.loads(source)["grammars"][0]["json_schema"]
        rules = f"answer: %json {json.dumps(schema)}\n"
    else:
        rules = re.sub(r"(?m)^%llguidance .*\n", "", re.sub(r"(?m)^start:", "answer:", source, count=1), count=1)
    ended = f" <[{','.join(map(str, end_ids))}]>?" if end_ids else ""
    return f"%llguidance {{}}\nstart: answer{ended}\n{rules}"


def scored(place: Mapping[int, Any] | None, token_id: int, wanted: int | None) -> tuple[float, Tops]:
    """A token's log-probability and the `wanted` likeliest, of vLLM's for one place; NaN where it gave none."""
    if not place or token_id not in place:
        return math.nan, ()
    ranked = sorted(place.items(), key=lambda item: item[1].rank)
    tops = tuple((other, found.logprob) for other, found in ranked[: wanted or 0])
    return place[token_id].logprob, tops
