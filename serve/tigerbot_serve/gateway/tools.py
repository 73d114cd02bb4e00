"""What an answer is held to: `response_format`, `tools` and `tool_choice` as one grammar.

Calls are written as `<tool_call>`, a JSON object of name and arguments, `</tool_call>`. Where the model may choose it
writes freely until it opens a call; from there on the call is whole and its arguments follow the tool's schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tigerbot.errors import InputError
from tigerbot.spec import GrammarSpec
from tigerbot_serve.engine.grammar import following, json_source
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.messages import CLOSE, OPEN, Body

MAX_CALLS = 16
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ToolName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]


class Function(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """As a chat template takes it."""
        return self.model_dump(exclude_none=True)


class Named(Body):
    name: ToolName


class NamedTool(Body):
    type: Literal["function"]
    function: Named


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class JsonSchema(Body):
    name: ToolName
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = PlainFormat | JsonSchemaFormat | None
Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools | None


@dataclass(frozen=True)
class Toolbox:
    """The tools an answer may call.

    Attributes:
        must: it is calls and nothing else.
        most: how many calls it may hold.
    """

    tools: tuple[Tool, ...]
    must: bool
    most: int


def toolbox_of(tools: Sequence[Tool] | None, choice: Choice, parallel: bool | None) -> Toolbox | None:
    """What `tools` and `tool_choice` come to; None where nothing may be called.

    Raises:
        ApiError: 400 a choice of what is not there, or two tools of one name.
    """
    by_name = {tool.function.name: tool for tool in tools or ()}
    if len(by_name) < len(tools or ()):
        raise _wrong("tools", "two tools have one name")
    if not by_name and choice not in (None, "none", "auto"):
        raise _wrong("tool_choice", "there are no tools to choose from")
    if not by_name or choice == "none":
        return None
    chosen = list(by_name)
    if isinstance(choice, NamedTool):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedTools):
        chosen = [named.function.name for named in choice.allowed_tools.tools]
    for name in chosen:
        if name not in by_name:
            raise _wrong("tool_choice", f"there is no tool {name!r}; there are {', '.join(sorted(by_name))}")
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
    most = 1 if parallel is False or isinstance(choice, NamedTool) else MAX_CALLS
    return Toolbox(tuple(by_name[name] for name in dict.fromkeys(chosen)), mode not in (None, "auto"), most)


def grammar_source(form: Format, toolbox: Toolbox | None, spec: GrammarSpec) -> tuple[str, str] | None:
    """The source of the grammar that an answer is held to, and the field that asked; None: it is free text.

    Raises:
        ApiError: 400 a schema that is too large or too deep.
    """
    schema = _bounded("response_format", lambda: _schema_of(form, spec))
    if toolbox is None:
        return None if schema is None else (json_source(schema), "response_format")
    return _bounded("tools", lambda: _lark(toolbox, schema, spec)), "tools"


def _schema_of(form: Format, spec: GrammarSpec) -> dict[str, Any] | None:
    if isinstance(form, JsonSchemaFormat):
        return following(form.json_schema.schema_, spec, strict=bool(form.json_schema.strict))
    if form is not None and form.type == "json_object":
        return following({"type": "object"}, spec, strict=True)
    return None


def _lark(toolbox: Toolbox, schema: dict[str, Any] | None, spec: GrammarSpec) -> str:
    """Calls, or the text beside them: free text may lead to calls, JSON of a schema stands instead of them."""
    more = f'("\\n" call){{0,{toolbox.most - 1}}}' if toolbox.most > 1 else ""
    bodies, rules = [], []
    for index, tool in enumerate(toolbox.tools):
        function = tool.function
        arguments = following(function.parameters or NO_ARGUMENTS, spec, strict=bool(function.strict))
        named = json.dumps(f'{function.name}", "arguments": ')
        bodies.append(f"{named} arguments_{index}")
        rules.append(f"arguments_{index}: %json {json.dumps(arguments)}")
    head, tail = json.dumps('\n{"name": "'), json.dumps(f"}}\n{CLOSE}")
    called = [f"call: {json.dumps(OPEN)} rest", f"rest: {head} body {tail}", f"body: {' | '.join(bodies)}", *rules]
    if toolbox.must:
        start = [f"start: call {more}"]
    elif schema is not None:
        start = [f"start: call {more} | json", f"json: %json {json.dumps(schema)}"]
    else:
        start = [f"start: TEXT | lead rest {more}", f"lead[lazy]: TEXT {json.dumps(OPEN)}", r"TEXT: /(.|\n)*/"]
    return "\n".join(["%llguidance {}", *start, *called, ""])


def _bounded(param: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except InputError as error:
        raise _wrong(param, str(error)) from None


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
