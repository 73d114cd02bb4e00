"""What an answer is held to: `response_format`, `tools` and `tool_choice` as one grammar.

Calls are written as the model's own template has them (`notations.py`). Where the model may choose it writes freely until
it opens a call; from there on the call is whole and its arguments follow the tool's schema. Where nothing but its
beginning says that an answer is a call, no other text begins with a brace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import regex
from pydantic import Field

from tigerbot.errors import InputError
from tigerbot.spec import GrammarSpec
from tigerbot_serve.engine.grammar import following, json_source
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.messages import Body
from tigerbot_serve.gateway.notations import HERMES, Notation, notation_of

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
        notation: how it writes them.
        special: parts of the notation that are special tokens, and their ids.
    """

    tools: tuple[Tool, ...]
    must: bool
    most: int
    notation: Notation
    special: dict[str, int]


def toolbox_of(tools: Sequence[Tool] | None, choice: Choice, parallel: bool | None, tokenizer: Any) -> Toolbox | None:
    """What `tools` and `tool_choice` come to with this tokenizer's template; None where nothing may be called.

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
    notation = notation_of(tokenizer) or HERMES
    alone = parallel is False or isinstance(choice, NamedTool) or not notation.parallel
    return Toolbox(
        tuple(by_name[name] for name in dict.fromkeys(chosen)),
        mode not in (None, "auto"),
        1 if alone else MAX_CALLS,
        notation,
        notation.special_ids(tokenizer),
    )


def grammar_source(form: Format, toolbox: Toolbox | None, spec: GrammarSpec) -> tuple[str, str] | None:
    """The source of the grammar that an answer is held to, and the field that asked; None: it is free text.

    Raises:
        ApiError: 400 a schema that is too large or too deep, or that calls could not be told from.
    """
    schema = _bounded("response_format", lambda: _schema_of(form, spec))
    if toolbox is None:
        return None if schema is None else (json_source(schema), "response_format")
    notation = toolbox.notation
    if schema is not None and not (toolbox.must or notation.mark or notation.may_lead in toolbox.special):
        raise _wrong("response_format", "this model writes calls as bare JSON: ask for tools or for a format, not both")
    return _bounded("tools", lambda: _lark(toolbox, schema, spec)), "tools"


def _schema_of(form: Format, spec: GrammarSpec) -> dict[str, Any] | None:
    if isinstance(form, JsonSchemaFormat):
        return following(form.json_schema.schema_, spec, strict=bool(form.json_schema.strict))
    if form is not None and form.type == "json_object":
        return following({"type": "object"}, spec, strict=True)
    return None


def _lark(toolbox: Toolbox, schema: dict[str, Any] | None, spec: GrammarSpec) -> str:
    """Calls, or the text beside them: free text may lead to calls, JSON of a schema stands instead of them."""
    notation, special = toolbox.notation, toolbox.special
    bodies, rules = [], []
    for index, tool in enumerate(toolbox.tools):
        function = tool.function
        arguments = following(function.parameters or NO_ARGUMENTS, spec, strict=bool(function.strict))
        bodies.append(f"{_items(function.name + notation.between, special)} arguments_{index}")
        rules.append(f"arguments_{index}: %json {json.dumps(arguments)}")
    following_call = f"{_items(notation.join + notation.before, special)} body {_items(notation.after, special)}"
    more = f"({following_call}){{0,{toolbox.most - 1}}}" if toolbox.most > 1 else ""
    head = (notation.open + notation.before).removeprefix(notation.mark)
    rest = f"{_items(head, special)} body {_items(notation.after, special)} {more} {_items(notation.close, special)}"
    mark = _items(notation.mark, special)
    if notation.may_lead in special:  # beside JSON of a schema, nothing else tells a call from it
        mark = f"<[{special[notation.may_lead]}]>{'' if schema is not None and not toolbox.must else '?'}"
    called = [
        f"call: {mark} rest",
        f"rest: {rest}",
        f"body: {' | '.join(bodies)}",
        *rules,
    ]
    if toolbox.must:
        start = ["start: call"]
    elif schema is not None:
        start = ["start: call | json", f"json: %json {json.dumps(schema)}"]
    elif not notation.mark:
        start = ["start: TEXT | call", r"TEXT: /([^{](.|\n)*)?/"]
    elif notation.mark in special:
        start = ["start: TEXT | TEXT call", r"TEXT: /(.|\n)*/"]
    else:
        start = ["start: TEXT | lead rest", f"lead[lazy]: TEXT {mark}", r"TEXT: /(.|\n)*/"]
    return "\n".join(["%llguidance {}", *start, *called, ""])


def _items(text: str, special: dict[str, int]) -> str:
    """A text as Lark has it: its special tokens by their ids, the rest as strings."""
    parts = regex.split(f"({'|'.join(map(regex.escape, special))})", text) if special else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)


def _bounded(param: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except InputError as error:
        raise _wrong(param, str(error)) from None


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
