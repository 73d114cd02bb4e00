"""A conversation as clients send it, and as a chat template wants it.

A template that takes tools, and writes calls in a notation that is known here, is given them, their calls and their
answers. For another one the tools are a system text, calls are the text that Hermes models write them as, and answers
are a user's text. This module knows nothing about the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tigerbot import chat
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.notations import HERMES, Notation, notation_of

TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query. Their signatures are:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Body(BaseModel):
    """A part of a request's body."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, str]:
        """Role and text as any chat template takes them."""
        if self.role == "tool":
            return {"role": "user", "content": f"<tool_response>\n{self.text}\n</tool_response>"}
        calls = [HERMES.written([(call.function.name, call.function.arguments)]) for call in self.tool_calls or ()]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join([*([self.text] if self.text or not calls else []), *calls])}


def encoded(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins.

    Raises:
        ApiError: 400 a tool's answer that nobody asked for.
        InputError, ModelError: see `tigerbot.chat.encode_chat`.
    """
    _check_answers(messages)
    if (notation := notation_of(tokenizer)) is not None:
        rows = [_row(message, notation) for message in messages]
        return chat.encode_chat(tokenizer, rows, generation_prompt=True, tools=tools)[0]
    plain = [message.plain() for message in messages]
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = TOOLS_TEXT.format(tools=lines)
        own = plain.pop(0)["content"] if plain[0]["role"] == "system" else ""
        plain.insert(0, {"role": "system", "content": f"{own}\n\n{text}" if own else text})
    return chat.encode_chat(tokenizer, plain, generation_prompt=True)[0]  # type: ignore[arg-type]


def _row(message: Message, notation: Notation) -> chat.Message:
    row: chat.Message = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call, notation)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    return row


def _arguments(call: ToolCall, notation: Notation) -> Any:
    """As templates want them, mostly an object; what is none stays the text that the client sent."""
    if notation.text_arguments:
        return call.function.arguments
    try:
        found = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments
    return found if isinstance(found, dict) else call.function.arguments


def _check_answers(messages: Sequence[Message]) -> None:
    asked: set[str] = set()
    for index, message in enumerate(messages):
        asked.update(call.id for call in message.tool_calls or ())
        if message.role == "tool" and message.tool_call_id not in asked:
            what = "answers no call of an earlier message" if message.tool_call_id else "is missing"
            param = f"messages.{index}.tool_call_id"
            raise ApiError(400, f"{param}: {what}", param=param, code="invalid_value")
