"""One row's story: the prompt, the tokens so far, their text, and why it ended.

Text is given out as soon as it is final: what may still be the beginning of a stop text, or a character of which a
byte is missing, is held back. This module knows nothing about tensors or members.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tigerbot_serve.engine.request import FinishReason, Request, TokenEvent

if TYPE_CHECKING:
    from tigerbot_serve.ensemble.pull import Pull

_MISSING = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_CONTEXT = 4  # tokens decoded again before the new ones: some decoders join a token to the one before it


class TextStream:
    """Token ids in, final text out; the same text that decoding all ids at once gives."""

    def __init__(self, tokenizer: Any, stop: Many[str] = ()) -> None:
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that have left it
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became final with this token."""
        self._window.append(token_id)
        text = self._decode(self._window, skip_special_tokens=True)
        # Only the last replacement character can still become another one: earlier bytes are known to be broken.
        final = text[:-1] if text.endswith(_MISSING) else text
        new, self._given = final[self._given :], max(self._given, len(final))
        if final is text and len(self._window) > 4 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._given = len(self._decode(self._window, skip_special_tokens=True))
        return self._release(new)

    def flush(self) -> str:
        """What is held back at the end. Bytes that never became a character are dropped."""
        held, self._held = self._held, ""
        return held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Sequence:
    """One decoding of a request: the draft, or a rewrite of it.

    Args:
        request: what is asked for.
        max_tokens: its limit, cut to what fits the engine.
        dial, temperature: the request's own, or a rewrite's.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        end_ids: frozenset[int],
        *,
        max_tokens: int,
        dial: float,
        temperature: float | None,
        rng: random.Random,
    ) -> None:
        self.request = request
        self.prompt_ids = request.prompt_ids
        self.max_tokens = max_tokens
        self.dial = dial
        self.temperature = temperature
        self.rng = rng
        self.output_ids: list[int] = []
        self.tokens: list[TokenEvent] = []
        self.counts: dict[int, int] = {}  # of the answer's own tokens
        self.prompt_tokens: list[TokenEvent] = []
        self.matcher = request.grammar.begin() if request.grammar is not None else None
        self.failure = ""  # why its grammar cannot be followed further
        self.finish_reason: FinishReason | None = None
        self.prefilled = self.cached = 0  # tokens of the prompt: read or known, known
        self.debt = self.skipped = 0  # tokens that one member was not fed: now (the last one apart), and in all
        self.trust, self.skipping = 0.0, False  # how often of late one member's state was enough; see gate.py
        self._ahead: tuple[int, Any] = (0, None)
        self.pull: Pull | None = None  # of the evidence, in a rewrite
        self.surprise = 0.0  # lingering, of the last token to the factual member; see tigerbot.surprise
        self.expected: list[float] = []  # the factual member's log-probability of each token, where p_dev was read
        self._stream = TextStream(tokenizer, request.stop)
        self._prompt_stream = TextStream(tokenizer)
        self._end_ids = end_ids

    @property
    def fed(self) -> int:
        """Tokens whose keys and values are cached when the next one is fed: all but the last."""
        return len(self.prompt_ids) + len(self.output_ids) - 1

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def answer(self) -> list[TokenEvent]:
        """The tokens without the one that ends the turn."""
        return self.tokens[:-1] if self.tokens and self.tokens[-1].token_id in self._end_ids else self.tokens

    @property
    def left(self) -> int:
        """Upper bound of the tokens still to prefill and decode."""
        return len(self.prompt_ids) - self.prefilled + self.max_tokens - len(self.output_ids)

    def append(
        self,
        token_id: int,
        logprob: float,
        top_logprobs: tuple[tuple[int, float], ...],
        p_div: float | None,
        p_dev: float | None,
        w: float,
    ) -> TokenEvent:
        """Take the next token; its event carries the text that became final, all of it when this is the last one."""
        self.output_ids.append(token_id)
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        ended = token_id in self._end_ids
        if self.matcher is not None:
            self.matcher.take(token_id)
        text = "" if ended else self._stream.push(token_id)
        if self.failure:
            text, self.finish_reason = "", "grammar"
        elif ended or self._stream.stopped or (self.matcher is not None and self.matcher.ended):
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and not self._stream.stopped:
            text += self._stream.flush()
        event = TokenEvent(text, token_id, logprob, top_logprobs, p_div, p_dev, w)
        self.tokens.append(event)
        return event

    def keep_ahead(self, state: Any) -> None:
        """A member's state of the last token, read before the other one's; it is good until the next token."""
        self._ahead = (len(self.output_ids), state)

    def read_ahead(self) -> Any:
        """What was kept, or None when tokens were taken since."""
        place, state = self._ahead
        return state if place == len(self.output_ids) else None

    def read_prompt(self, token: TokenEvent) -> None:
        """The prompt's next token, with what the mixture thought of it."""
        self.prompt_tokens.append(replace(token, text=self._prompt_stream.push(token.token_id), of_prompt=True))

    def read_p_dev(self, p_dev: float | None, back: int = 0) -> None:
        """The last token was fed: what the factual member's state says about it replaces the reading before it.

        `back` is how many tokens before the last one it was, where the factual member is late.
        """
        if self.tokens and p_dev is not None:
            self.tokens[-1 - back] = replace(self.tokens[-1 - back], p_dev=p_dev)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
