"""The shapes of OpenAI's answers, and our `ensemble` object beside them. From events to JSON, no HTTP."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from tigerbot.chat import end_token_ids
from tigerbot_serve.engine.request import FinishEvent, Summary, TokenEvent, Usage
from tigerbot_serve.ensemble.evidence import Evidence, Span
from tigerbot_serve.gateway.calls import CallReader, message_of
from tigerbot_serve.gateway.notations import Notation


@dataclass(frozen=True)
class Shape:
    """What one response looks like.

    Attributes:
        chat: chat completion, else plain completion.
        logprobs: give log-probabilities.
        tokens: give every token's probabilities in the `ensemble` object.
        fingerprint: of what answers.
        each: answers to a prompt; choice i answers prompt i // each.
        prompts: what `echo` shows before the answers to each prompt.
        begun: the first token of every prompt was not the client's.
        calls: how the text may hold tool calls, if it may.
        evidence: give what the judge doubted, looked up and decided.
    """

    id: str
    model: str
    tokenizer: Any
    chat: bool
    logprobs: bool = False
    tokens: bool = False
    fingerprint: str = ""
    each: int = 1
    prompts: tuple[str, ...] = ()
    begun: bool = False
    calls: Notation | None = None
    evidence: bool = False
    _readers: dict[int, CallReader] = field(default_factory=dict)

    def whole(self, answers: Sequence[tuple[Sequence[TokenEvent], FinishEvent]]) -> dict[str, Any]:
        """A response that is not a stream, one choice an answer. An answer's tokens begin with the prompt's, if any."""
        choices = [self._choice(index, tokens, end) for index, (tokens, end) in enumerate(answers)]
        if len(answers) > 1:
            for choice, (_, end) in zip(choices, answers, strict=True):
                choice["ensemble"] = self.ensemble(end.summary)
        first = answers[0][1].summary
        return self._envelope("chat.completion" if self.chat else "text_completion", choices) | {
            "usage": usage([end.usage for _, end in answers], self.each),
            "ensemble": self.ensemble(first),
        }

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a stream: it says that the request was accepted."""
        delta = {"role": "assistant", "content": ""} if self.chat else self._prompt(index)
        return self._chunk(index, delta, None)

    def beat(self, phase: str | None = None, index: int = 0) -> dict[str, Any]:
        """A chunk with an empty delta: it keeps the connection alive, and names the phase of a held answer."""
        chunk = self._chunk(index, {} if self.chat else "", None)
        return chunk | {"ensemble": {"phase": phase}} if phase else chunk

    def piece(self, index: int, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """A chunk of text, None where these tokens say nothing yet. The prompt's own bring only log-probabilities."""
        text = "".join(token.text for token in tokens if not token.of_prompt)
        delta: Any = self._delta(index, text) if self.chat else text
        if not (delta or self.logprobs or self.tokens):
            return None
        chunk = self._chunk(index, delta, None)
        if self.logprobs:
            chunk["choices"][0]["logprobs"] = self._logprobs(tokens)
        if self.tokens:
            chunk["ensemble"] = {"tokens": self._shown(tokens)}
        return chunk

    def end(self, index: int, event: FinishEvent) -> dict[str, Any]:
        """The last chunk of a choice."""
        reader = self._readers.get(index)
        delta = _merged(reader.flush()) if reader else {}
        reason = _reason(event, bool(reader and reader.calls))
        return self._chunk(index, delta if self.chat else "", reason) | {"ensemble": self.ensemble(event.summary)}

    def spent(self, spent: Sequence[Usage]) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` asks for; `spent` by choice."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, []) | {"usage": usage(spent, self.each)}

    def ensemble(self, summary: Summary) -> dict[str, Any]:
        """What the ensemble did."""
        found: dict[str, Any] = {
            "dial": summary.dial,
            "w_mean": summary.w_mean,
            "p_dev_max": summary.p_dev_max,
            "verdict": summary.verdict,
            "rewrites": summary.rewrites,
        }
        if summary.gate_rate is not None:
            found["gate_rate"] = summary.gate_rate
        if self.tokens:
            found["tokens"] = self._shown(summary.tokens)
        if summary.draft is not None:
            found["draft"] = summary.draft
            if self.tokens:
                found["draft_tokens"] = self._shown(summary.draft_tokens)
        if self.tokens or self.evidence:
            found |= {
                "reasons": list(summary.reasons),
                "evidence": [_public(one) for one in summary.evidence],
                "flagged": [_public(span) for span in summary.flagged],
            }
            if summary.draft is not None:
                found["draft_flagged"] = [_public(span) for span in summary.draft_flagged]
        return found

    def _choice(self, index: int, tokens: Sequence[TokenEvent], end: FinishEvent) -> dict[str, Any]:
        text = "".join(token.text for token in tokens if not token.of_prompt)
        logprobs = self._logprobs(tokens) if self.logprobs else None
        if not self.chat:
            text = self._prompt(index) + text
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _reason(end)}
        said = message_of(text, self.calls) if self.calls else {"content": text}
        message = {"role": "assistant", "refusal": None, **said}
        reason = _reason(end, "tool_calls" in said)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _prompt(self, index: int) -> str:
        return self.prompts[index // self.each] if self.prompts else ""

    def _delta(self, index: int, text: str) -> dict[str, Any]:
        if not self.calls:
            return {"content": text} if text else {}
        return _merged(self._readers.setdefault(index, CallReader(self.calls, sure=True)).push(text))

    def _chunk(self, index: int, delta: Any, reason: str | None) -> dict[str, Any]:
        body = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **body, "logprobs": None, "finish_reason": reason}
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        counted = self._counted(tokens)
        if self.chat:
            return {"content": [self._content(token) for token in counted], "refusal": None}
        names = [self._name(token.token_id) for token in counted]
        offsets, at = [], 0
        for token in counted:
            offsets.append(at)
            at += len(token.text)
        tops = [{self._name(i): value for i, value in token.top_logprobs} or None for token in counted]
        return {
            "tokens": names,
            "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token in counted],
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
            {"text": token.text, "p_div": token.p_div, "p_dev": token.p_dev, "w": token.w, "gated": token.gated}
            for token in self._counted(tokens)
            if not token.of_prompt
        ]

    def _counted(self, tokens: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The tokens without the one that ends the turn, and without one that this server put before the prompt."""
        ends = _ends(self.tokenizer)
        begun = self.begun and bool(tokens) and tokens[0].of_prompt
        return [token for token in tokens[int(begun) :] if token.of_prompt or token.token_id not in ends]


def _public(one: Evidence | Span) -> dict[str, Any]:
    return asdict(one)


def usage(spent: Sequence[Usage], each: int = 1) -> dict[str, Any]:
    """OpenAI's usage; abandoned drafts and the judge's reading are tokens too, and are named.

    A prompt counts once for its `each` answers, and as known only as far as the first of them found it so.
    """
    by_prompt = [spent[at : at + each] for at in range(0, len(spent), each)]
    prompt = sum(max(one.prompt_tokens for one in answers) for answers in by_prompt)
    cached = sum(min(one.cached_tokens for one in answers) for answers in by_prompt)
    given = sum(one.completion_tokens for one in spent)
    drafts = sum(one.draft_tokens for one in spent)
    judged = sum(one.judge_tokens for one in spent)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": given + drafts,
        "total_tokens": prompt + given + drafts,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": drafts, "draft_tokens": drafts, "judge_tokens": judged},
    }


def _reason(end: FinishEvent, called: bool = False) -> str:
    """OpenAI's finish reason: an answer that was cut off says so, calls or not."""
    return "tool_calls" if called and end.finish_reason == "stop" else end.finish_reason


def _merged(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The deltas of one piece of text as one."""
    merged: dict[str, Any] = {}
    for delta in deltas:
        if "content" in delta:
            merged["content"] = merged.get("content", "") + delta["content"]
        merged.setdefault("tool_calls", []).extend(delta.get("tool_calls", ()))
    return {name: value for name, value in merged.items() if value}


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
