"""What crosses the border between the gateway and the engine: a request in, events out. Plain data, no torch.

A request with `verify` holds its text back until the judge has spoken: phases first, then the tokens of the text that
was kept. Without it tokens come as they are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tigerbot.chat import Message
from tigerbot.errors import InputError
from tigerbot_serve.engine.grammar import Grammar
from tigerbot_serve.ensemble.evidence import Evidence, Span

# "deadline": it came before a whole text was there; "grammar": its grammar became too large to follow further;
# "memory": there was none for it.
FinishReason = Literal["stop", "length", "cancelled", "deadline", "grammar", "memory", "error"]
Phase = Literal["draft", "judge", "search", "rewrite"]
Verdict = Literal["ok", "rewritten", "flagged", "unverified"]


@dataclass(frozen=True)
class Request:
    """One answer to decode.

    Attributes:
        dial: 0 is the factual member alone, 1 the creative member alone.
        temperature: 0 is greedy; None takes the dial's own, tied to the mixing weight.
        seed: None draws one.
        top_k: 0 keeps all.
        min_p: least share of the best token's probability, after temperature.
        presence_penalty, frequency_penalty: taken from the log-probabilities of the answer's own tokens.
        repetition_penalty: factor on the log-probabilities of tokens of prompt and answer.
        logit_bias: token ids and what is added to their log-probabilities; -100 bans.
        grammar: what the answer is held to; its end ends the answer.
        stop: texts that end the answer and are not part of it, also across token borders.
        logprobs: how many alternatives to give with every token's log-probability; None gives neither.
        verify: judge the answer, and rewrite it up to `max_rewrites` times, before any text is given.
        want_tokens: keep every token's probabilities in the summary, the draft's too.
        shown: special tokens that are part of the text: they are the marks of tool calls.
        unjudged: a text that holds this is given as it is (the mark of a tool call; nothing for "").
        messages: the conversation that the prompt was made of: what a rewrite with evidence is made of.
        plugins: names of those that may look up what the judge doubts.
        want_evidence: keep evidence, reasons and doubted spans in the summary.
        prompt_logprobs: give the prompt's own log-probabilities, with so many alternatives, before the answer.
        deadline_s: seconds from its submission after which the request ends within one step.
        tenant: whose request it is; what one tenant's prompts left cached is of no use to another.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    dial: float
    temperature: float | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    verify: bool = False
    max_rewrites: int = 0
    want_tokens: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    shown: tuple[int, ...] = ()
    unjudged: str = ""
    messages: tuple[Message, ...] = ()
    plugins: tuple[str, ...] = ()
    want_evidence: bool = False
    prompt_logprobs: int | None = None
    deadline_s: float | None = None
    tenant: str = ""


def room_for(request: Request, max_length: int, vocab_size: int) -> int:
    """How many tokens may follow a request's prompt.

    Raises:
        InputError: none, or the prompt is not of this vocabulary.
    """
    room = max_length - len(request.prompt_ids)
    if not request.prompt_ids or room < 1:
        raise InputError(
            f"the prompt has {len(request.prompt_ids)} tokens, wants 1 to {max_length - 1}",
            where="prompt",
            fix="shorten it",
        )
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
        raise InputError(f"token ids go from 0 to {vocab_size - 1}", where="prompt", fix="use this tokenizer")
    return room


@dataclass(frozen=True)
class TokenEvent:
    """One token of the answer. `text` may be empty while a character or a stop text is incomplete.

    `logprob` is natural, the mixture's own: before penalties, bias, grammar, temperature and masks (so that dial 0 and
    1 are the single models'); `p_div` and `p_dev` are None where no heads are loaded; `w` is the creative weight.
    `gated`: the gate left the second member out, so that `logprob` and `w` are those of the first one alone.
    """

    text: str
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    p_div: float | None
    p_dev: float | None
    w: float
    of_prompt: bool = False
    gated: bool = False


@dataclass(frozen=True)
class PromptEvent:
    """The prompt's tokens and the mixture's log-probability of each (NaN for the first), where they were asked for."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class PhaseEvent:
    """A held answer entered a phase."""

    phase: Phase


@dataclass(frozen=True)
class Usage:
    """Tokens spent. `completion_tokens` are of the text given; abandoned drafts and the judge's prefill are beside.

    `cached_tokens` of the prompt were known from earlier ones and not read again.
    """

    prompt_tokens: int
    completion_tokens: int
    draft_tokens: int = 0
    judge_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Summary:
    """The `ensemble` object of an answer. `gate_rate`: the share of tokens taken without the second member, if any."""

    dial: float
    w_mean: float
    p_dev_max: float | None
    verdict: Verdict
    rewrites: int = 0
    gate_rate: float | None = None
    tokens: tuple[TokenEvent, ...] = ()
    draft: str | None = None
    draft_tokens: tuple[TokenEvent, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    reasons: tuple[str, ...] = ()
    flagged: tuple[Span, ...] = ()
    draft_flagged: tuple[Span, ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The last event of every request. `error` says what failed when the reason is "error", "memory" or "grammar"."""

    finish_reason: FinishReason
    usage: Usage
    summary: Summary
    error: str = ""


Event = TokenEvent | PromptEvent | PhaseEvent | FinishEvent


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now. `outstanding_tokens` is the upper bound of what it still has to decode."""

    slots: int
    slots_used: int
    queued: int
    outstanding_tokens: int
    tokens_decoded: int
    steps: int
    prefix_bytes: int = 0
    prefix_tokens_reused: int = 0
    tokens_gated: int = 0
    gate_variation: float = 0.0
    tokens_drafted: int = 0
    drafts_kept: int = 0
