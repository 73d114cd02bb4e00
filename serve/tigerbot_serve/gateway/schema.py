"""Bodies of the OpenAI requests, with our fields beside theirs: `creativity`, `verify`, `max_rewrites`, `compare`, ...

Fields that this server does not know are ignored and named, since SDKs add new ones every month; a known field of a
wrong type or range is refused with its name. `top_k`, `min_p` and `repetition_penalty` are named as vLLM names them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.messages import Body, Message
from tigerbot_serve.gateway.tools import AllowedTools, JsonSchemaFormat, NamedTool, PlainFormat, Tool

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Mode = Literal["none", "auto", "required"]

MAX_PROMPTS = 32


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What chat and plain completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], Field(max_length=1024)] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=4)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: PlainFormat | JsonSchemaFormat | None = Field(None, discriminator="type")
    user: str | None = None
    creativity: Annotated[float, Field(ge=0, le=1)] | None = None
    verify: bool | None = None
    max_rewrites: Annotated[int, Field(ge=0, le=2)] | None = None
    ensemble_tokens: bool | None = None
    plugins: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=8)] | None = None
    evidence: bool | None = None
    timeline: bool | None = None
    compare: bool | None = None

    @property
    def each(self) -> int:
        """Answers to a prompt."""
        return 3 if self.compare else self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to give with every token's log-probability; None: no log-probabilities."""
        return None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Mode | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampling):
    """`max_tokens` 0 with `echo` gives the prompt alone, with its log-probabilities."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item]


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(kind: type[AnyBody], raw: dict[str, Any]) -> tuple[AnyBody, list[str]]:
    """The typed body and the names of the fields that are ignored.

    Raises:
        ApiError: 400 with `param`, the first field that is wrong.
    """
    try:
        body = kind.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None
    return body, sorted(name for name in raw if name not in kind.model_fields)


def _refusal(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False, include_input=False)[0]
    path = _path(problem["loc"])
    param = ".".join(path) or None
    if problem["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param=param, code="missing_required_parameter")
    wants = problem["msg"].replace("Input should be", "wants to be")
    wants = _WANTS.get(path[0], wants) if len(path) == 1 else wants
    return ApiError(400, f"{param}: {wants}", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """The place in the body. It ends where the alternatives of a union begin ("str", "list[...]", a class's name)."""
    if loc[:1] == ("response_format",):
        loc = (*loc[:1], *loc[2:])  # the second is the value of `type`
    path: list[str] = []
    for part in map(str, loc):
        if path and (part in ("str", "constrained-str", "[key]") or part.startswith(("list[", "literal["))):
            break
        if part not in ("NamedTool", "AllowedTools"):
            path.append(part)
    return path


_WANTS = {
    "prompt": f"wants to be a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either",
    "tool_choice": "wants to be 'none', 'auto', 'required', or to name a function",
}
