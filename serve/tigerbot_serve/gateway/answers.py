"""The shapes of OpenAI's answers, and our `ensemble` object beside them. From events to JSON, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tigerbot.chat import end_token_ids
from tigerbot_serve.engine.request import FinishEvent, Summary, TokenEvent, Usage


@dataclass(frozen=True)
class Shape:
    """What one response looks like.

    Attributes:
        chat: chat completion, else plain completion.
        logprobs: give log-probabilities.
        tokens: give every token's probabilities in the `ensemble` object.
    """

    id: str
    model: str
    tokenizer: Any
    chat: bool
    logprobs: bool = False
    tokens: bool = False

    def whole(self, answers: Sequence[tuple[Sequence[TokenEvent], FinishEvent]]) -> dict[str, Any]:
        """A response that is not a stream, one choice an answer."""
        choices = [self._choice(index, tokens, end) for index, (tokens, end) in enumerate(answers)]
        if len(answers) > 1:
            for choice, (_, end) in zip(choices, answers, strict=True):
                choice["ensemble"] = self.ensemble(end.summary)
        first = answers[0][1].summary
        return self._envelope("chat.completion" if self.chat else "text_completion", choices) | {
            "usage": usage([end.usage for _, end in answers]),
            "ensemble": self.ensemble(first),
        }

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a stream: it says that the request was accepted."""
        return self._chunk(index, {"role": "assistant", "content": ""} if self.chat else "", None)

    def beat(self, phase: str | None = None, index: int = 0) -> dict[str, Any]:
        """A chunk with an empty delta: it keeps the connection alive, and names the phase of a held answer."""
        chunk = self._chunk(index, {} if self.chat else "", None)
        return chunk | {"ensemble": {"phase": phase}} if phase else chunk

    def piece(self, index: int, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """A chunk of text."""
        text = "".join(token.text for token in tokens)
        chunk = self._chunk(index, {"content": text} if self.chat else text, None)
        if self.logprobs:
            chunk["choices"][0]["logprobs"] = self._logprobs(tokens)
        if self.tokens:
            chunk["ensemble"] = {"tokens": self._shown(tokens)}
        return chunk

    def end(self, index: int, event: FinishEvent) -> dict[str, Any]:
        """The last chunk of a choice."""
        chunk = self._chunk(index, {} if self.chat else "", event.finish_reason)
        return chunk | {"ensemble": self.ensemble(event.summary)}

    def spent(self, spent: Iterable[Usage]) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` asks for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, []) | {"usage": usage(spent)}

    def ensemble(self, summary: Summary) -> dict[str, Any]:
        """What the ensemble did."""
        found: dict[str, Any] = {
            "dial": summary.dial,
            "w_mean": summary.w_mean,
            "p_dev_max": summary.p_dev_max,
            "verdict": summary.verdict,
            "rewrites": summary.rewrites,
        }
        if self.tokens:
            found["tokens"] = self._shown(summary.tokens)
        if summary.draft is not None:
            found["draft"] = summary.draft
            if self.tokens:
                found["draft_tokens"] = self._shown(summary.draft_tokens)
        return found

    def _choice(self, index: int, tokens: Sequence[TokenEvent], end: FinishEvent) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        logprobs = self._logprobs(tokens) if self.logprobs else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": end.finish_reason}

    def _chunk(self, index: int, delta: Any, reason: str | None) -> dict[str, Any]:
        body = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **body, "logprobs": None, "finish_reason": reason}
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model, "choices": choices}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        counted = self._without_end(tokens)
        if self.chat:
            return {"content": [self._content(token) for token in counted], "refusal": None}
        names = [self._name(token.token_id) for token in counted]
        offsets, at = [], 0
        for token in counted:
            offsets.append(at)
            at += len(token.text)
        tops = [{self._name(i): value for i, value in token.top_logprobs} for token in counted]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in counted],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }

    def _content(self, token: TokenEvent) -> dict[str, Any]:
        return self._scored(token.token_id, token.logprob) | {
            "top_logprobs": [self._scored(token_id, logprob) for token_id, logprob in token.top_logprobs]
        }

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token_id)
        return {"token": self._name(token_id), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    def _name(self, token_id: int) -> str:
        return token_bytes(self.tokenizer, token_id).decode("utf-8", "replace")

    def _shown(self, tokens: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        return [
            {"text": token.text, "p_div": token.p_div, "p_dev": token.p_dev, "w": token.w}
            for token in self._without_end(tokens)
        ]

    def _without_end(self, tokens: Sequence[TokenEvent]) -> list[TokenEvent]:
        ends = _ends(self.tokenizer)
        return [token for token in tokens if token.token_id not in ends]


def usage(spent: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's usage; abandoned drafts and the judge's reading are tokens too, and are named."""
    all_spent = list(spent)
    prompt = max((one.prompt_tokens for one in all_spent), default=0)
    given = sum(one.completion_tokens for one in all_spent)
    drafts = sum(one.draft_tokens for one in all_spent)
    judged = sum(one.judge_tokens for one in all_spent)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": given + drafts,
        "total_tokens": prompt + given + drafts,
        "completion_tokens_details": {"reasoning_tokens": drafts, "draft_tokens": drafts, "judge_tokens": judged},
    }


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of one token: a byte-level tokenizer writes each byte as one printable character."""
    name = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in tokenizer.all_special_ids:
        return name.encode()
    table = _byte_of_character()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return tokenizer.decode([token_id]).encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table (Radford et al. 2019) backwards: printable bytes stand for themselves, the others are moved up."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + index): byte for index, byte in enumerate(moved)}


_END_IDS: dict[int, frozenset[int]] = {}


def _ends(tokenizer: Any) -> frozenset[int]:
    key = id(tokenizer)
    if key not in _END_IDS:
        _END_IDS[key] = frozenset(end_token_ids(tokenizer))
    return _END_IDS[key]
