"""From an answer's text to what OpenAI's clients are told: content, and tool calls piece by piece as they come.

It reads what the grammar of `tools` lets a model write, and never shows the marks around a call. An answer that was cut
off in a call keeps what there was of it.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from tigerbot_serve.gateway.messages import CLOSE, OPEN

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"arguments"\s*:\s*(?=\S)')


class CallReader:
    """One answer's text in pieces in, deltas of OpenAI's shape out.

    Attributes:
        calls: how many calls have begun.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._text = ""  # not given yet
        self._state = self._content
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> list[dict[str, Any]]:
        """The deltas that became certain with this text."""
        self._text += text
        deltas: list[dict[str, Any]] = []
        while self._state(deltas):
            pass
        return deltas

    def flush(self) -> list[dict[str, Any]]:
        """What is held back at the end: text that might have opened a call."""
        held, self._text = self._text, ""
        return [{"content": held}] if held and self._state == self._content and not self.calls else []

    def _content(self, deltas: list[dict[str, Any]]) -> bool:
        before, found, after = self._text.partition(OPEN)
        keep = "" if found else _beginning(before)
        given = before[: len(before) - len(keep)]
        if given and not (self.calls and given.isspace()):  # a line break between two calls is no content
            deltas.append({"content": given})
        self._text = after if found else keep
        if found:
            self._state = self._head
        return bool(found)

    def _head(self, deltas: list[dict[str, Any]]) -> bool:
        found = _HEAD.match(self._text)
        if found is None:
            return False
        function = {"name": found[1], "arguments": ""}
        call = {"index": self.calls, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        deltas.append({"tool_calls": [call]})
        self.calls += 1
        self._text, self._state = self._text[found.end() :], self._arguments
        self._depth, self._quoted, self._escaped = 0, False, False
        return True

    def _arguments(self, deltas: list[dict[str, Any]]) -> bool:
        end = next((at + 1 for at, character in enumerate(self._text) if self._ends(character)), None)
        given, self._text = self._text[:end], self._text[len(self._text) if end is None else end :]
        if given:
            deltas.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": given}}]})
        if end is not None:
            self._state = self._tail
        return end is not None

    def _ends(self, character: str) -> bool:
        """Whether the object of arguments is whole with this character."""
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = character == "\\", character != '"'
        elif character == '"':
            self._quoted = True
        else:
            self._depth += (character in "{[") - (character in "}]")
            return self._depth == 0 and character in "}]"
        return False

    def _tail(self, deltas: list[dict[str, Any]]) -> bool:
        _, found, after = self._text.partition(CLOSE)
        if found:
            self._text, self._state = after, self._content
        return bool(found)


def message_of(text: str) -> dict[str, Any]:
    """The content and the calls of a whole answer, as an assistant's message."""
    reader = CallReader()
    content, calls = "", []
    for delta in [*reader.push(text), *reader.flush()]:
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    if not calls:
        return {"content": content}
    return {"content": content.strip() or None, "tool_calls": calls}


def _beginning(text: str) -> str:
    """The longest end of a text that a call's opening begins with."""
    return next((OPEN[:size] for size in range(min(len(text), len(OPEN)), 0, -1) if text.endswith(OPEN[:size])), "")
