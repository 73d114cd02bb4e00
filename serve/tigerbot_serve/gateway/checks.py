"""What a body is refused for before any of its text is encoded. It knows nothing about the engine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling


def check_size(body: Sampling, tokenizer: Any, max_length: int, max_messages: int) -> None:
    """Refuse too many messages, and a text that cannot fit, before it is encoded: a long one would hold up everybody.

    Raises:
        ApiError: 400 with the prompt's field.
    """
    if isinstance(body, ChatBody):
        if len(body.messages) > max_messages:
            message = f"{len(body.messages)} messages; at most {max_messages} are taken"
            raise ApiError(400, message, param="messages", code="invalid_value")
        texts = ["".join(message.text for message in body.messages)]
    else:
        assert isinstance(body, CompletionBody)
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    most = max_length * _longest_token(tokenizer)
    for text in texts:
        if len(text.encode()) > most:
            message = f"a prompt of {len(text):,} characters does not fit {max_length - 1} tokens"
            raise ApiError(400, message, param=prompt_field(body), code="context_length_exceeded")


def check_biases(body: Sampling, tokenizer: Any) -> None:
    """Refuse a token that this vocabulary does not have.

    Raises:
        ApiError: 400 with `logit_bias`.
    """
    size = len(tokenizer)
    for token, _ in body.biases:
        if token >= size:
            message = f"logit_bias: there is no token {token}; ids go from 0 to {size - 1}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")


def prompt_field(body: Sampling) -> str:
    """Where a body has what is read."""
    return "messages" if isinstance(body, ChatBody) else "prompt"


@lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    """An upper bound of the bytes that a token stands for; a normaliser may have shortened the text before."""
    shortens = 1 if tokenizer.backend_tokenizer.normalizer is None else 4
    return shortens * max(len(name.encode()) for name in tokenizer.get_vocab())
