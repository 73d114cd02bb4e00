"""Bodies of the OpenAI requests, with our fields beside theirs: `creativity`, `verify`, `max_rewrites`, `compare`.

Fields that this server does not know are ignored and named, since SDKs add new ones every month; a known field of a
wrong type or range is refused with its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tigerbot_serve.gateway.errors import ApiError

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=True)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text as a chat template wants them."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    include_usage: bool | None = None


class Sampling(_Body):
    """What chat and plain completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=4)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    creativity: Annotated[float, Field(ge=0, le=1)] | None = None
    verify: bool | None = None
    max_rewrites: Annotated[int, Field(ge=0, le=2)] | None = None
    ensemble_tokens: bool | None = None
    compare: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to give with every token's log-probability; None: no log-probabilities."""
        return None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampling):
    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


AnyBody = TypeVar("AnyBody", bound=Sampling)


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
    # The place in the body ends where the alternatives of a union begin ("str", "list[...]").
    path: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, str) and path and (part in ("str", "constrained-str") or part.startswith("list[")):
            break
        path.append(str(part))
    param = ".".join(path) or None
    wants = problem["msg"].replace("Input should be", "wants to be")
    if problem["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param}: {wants}", param=param, code="invalid_value")
