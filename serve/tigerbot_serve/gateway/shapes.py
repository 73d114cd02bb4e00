"""The answers as types, for the endpoint's OpenAPI document: `answers.py` builds those of the hot path without them.

A field that is not required is one that some requests ask for, or that some answers do not have.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ErrorBody(BaseModel):
    """`param` names the field of the body that is wrong, `code` says what to do about it in a word."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_exceeded", "server_error"]
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody


class TokenShown(BaseModel):
    """What the ensemble thought of one token. `gated`: the second member was not asked; `w` is the first one's end."""

    text: str
    p_div: float | None
    p_dev: float | None
    w: float
    gated: bool


class SpanShown(BaseModel):
    """Characters `start` to `end` of an answer that the judge doubts, and the highest p_dev in them."""

    start: int
    end: int
    text: str
    p_dev: float


class EvidenceShown(BaseModel):
    """A quotation that a plug-in found: `text` stands at `start` to `end` of its source."""

    plugin: str
    source: str
    text: str
    start: int
    end: int
    title: str
    url: str
    weight: float


class Moment(BaseModel):
    event: str
    ms: float


class Ensemble(BaseModel):
    """What the ensemble did. In a stream: the phase of a held answer, tokens as they come, and at the end all of it."""

    phase: Literal["draft", "judge", "search", "rewrite"] = "draft"
    dial: float = 0.3
    w_mean: float = 0.3
    p_dev_max: float | None = None
    verdict: Literal["ok", "rewritten", "flagged", "unverified"] = "ok"
    rewrites: int = 0
    tokens: list[TokenShown] = []
    draft: str = ""
    draft_tokens: list[TokenShown] = []
    gate_rate: float = 0.0
    reasons: list[str] = []
    evidence: list[EvidenceShown] = []
    flagged: list[SpanShown] = []
    draft_flagged: list[SpanShown] = []
    timeline: list[Moment] = []


class CompletionTokensDetails(BaseModel):
    """`completion_tokens` holds the tokens of abandoned drafts; what the judge read is beside it."""

    reasoning_tokens: int
    draft_tokens: int
    judge_tokens: int


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class PlainLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    ensemble: Ensemble | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    ensemble: Ensemble


class Delta(BaseModel):
    """Empty in a heartbeat and at the end."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One `data:` line of a streamed chat answer. `choices` is empty in the usage chunk only, which must be asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None
    ensemble: Ensemble | None = None


class PlainChoice(BaseModel):
    index: int
    text: str
    logprobs: PlainLogprobs | None
    finish_reason: FinishReason | None
    ensemble: Ensemble | None = None


class Completion(BaseModel):
    """A plain completion; a stream's chunks have the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[PlainChoice]
    usage: Usage | None = None
    ensemble: Ensemble | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Live(BaseModel):
    """One replica: its name, how many of each state there are, its engine and its recent past.

    Latencies are of the answers of the last five minutes, null when there were none; so are
    `w_tenths`, tokens by creative weight, (0, 0.1] first, and `verdicts`, judged answers.
    """

    replica: str
    replicas: dict[str, int]
    slots: int
    slots_used: int
    queued: int
    outstanding_tokens: int
    tokens_decoded: int
    tokens_per_s: float | None
    answers: int
    p50_s: float | None
    p99_s: float | None
    w_tenths: list[int]
    w_mean: float | None
    verdicts: dict[str, int]
    rewrites: int


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: str
