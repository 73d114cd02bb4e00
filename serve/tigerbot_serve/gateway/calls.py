"""From an answer's text to what OpenAI's clients are told: content, and tool calls piece by piece as they come.

It reads what the grammar of `tools` lets a model write, in the notation that its template has, and never shows the marks
around a call. What only looks like a call, or whose arguments are no JSON, is text. An answer that was cut off in a call
keeps what there was of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tigerbot_serve.gateway.notations import Notation

Deltas = list[dict[str, Any]]


class CallReader:
    """One answer's text in pieces in, deltas of OpenAI's shape out: the same calls, however the text is cut.

    Args:
        sure: arguments are given as they come, since the text is held to a grammar; else when they are known to be JSON.

    Attributes:
        calls: how many calls have been given.
    """

    def __init__(self, notation: Notation, *, sure: bool = False) -> None:
        self.calls = 0
        self._notation, self._sure = notation, sure
        self._text = ""  # not given yet
        self._head = ""  # of the call that is being read: what it was until its arguments, and its name
        self._name = ""
        self._state: Callable[[Deltas], bool] = self._content if notation.mark else self._first
        self._scanned, self._depth, self._quoted, self._escaped = 0, 0, False, False
        self._after_call = False  # where white space says nothing

    def push(self, text: str) -> Deltas:
        """The deltas that became certain with this text."""
        self._text += text
        deltas: Deltas = []
        while self._state(deltas):
            pass
        return deltas

    def flush(self) -> Deltas:
        """What is held back at the end: text that might have opened a call, and a call that was cut off."""
        deltas: Deltas = []
        held, self._text = self._text, ""
        if self._state == self._arguments and not self._sure:
            self._begin(deltas)
            self._give(deltas, held)
        elif self._state == self._content or (self._state == self._first and not self._notation.mark):
            self._text = held
            self._say(deltas, len(held))
        return deltas

    def _content(self, deltas: Deltas) -> bool:
        """Text up to what leads to calls."""
        mark = self._notation.mark
        at = self._text.find(mark) if mark else -1
        keep = 0 if at >= 0 or not mark else _overlap(self._text, mark)
        end = at if at >= 0 else len(self._text) - keep
        self._say(deltas, end)
        if at >= 0:
            self._state = self._first
        return at >= 0

    def _first(self, deltas: Deltas) -> bool:
        found = self._notation.first.match(self._text, partial=True)
        if found is None:
            self._say(deltas, len(self._notation.mark))
            self._state = self._content
            return True
        return self._enter(found)

    def _more(self, deltas: Deltas) -> bool:
        """After a call: the next one, or the end of all."""
        following = self._notation.next.match(self._text, partial=True)
        if following is not None:
            return self._enter(following)
        last = self._notation.last.match(self._text, partial=True)
        if last is not None and last.partial:
            return False
        if last is not None:
            self._text = self._text[last.end() :]
        self._state = self._content
        return True

    def _enter(self, found: Any) -> bool:
        """Go on to the arguments where the beginning of a call is whole."""
        if found.partial:
            return False
        self._head, self._name, self._text = self._text[: found.end()], found["name"], self._text[found.end() :]
        self._scanned, self._depth, self._quoted, self._escaped = 0, 0, False, False
        self._state = self._begun if self._sure else self._arguments
        return True

    def _begun(self, deltas: Deltas) -> bool:
        self._begin(deltas)
        self._state = self._arguments
        return True

    def _arguments(self, deltas: Deltas) -> bool:
        end = next((at + 1 for at in range(self._scanned, len(self._text)) if self._ends(self._text[at])), None)
        if self._sure:
            given, self._text = self._text[:end], "" if end is None else self._text[end:]
            self._give(deltas, given)
        elif end is None:
            self._scanned = len(self._text)
        else:
            self._whole(deltas, end)
            return True
        if end is not None:
            self._state = self._end
        return end is not None

    def _whole(self, deltas: Deltas, end: int) -> None:
        """An object has ended: a call, if it is JSON."""
        given, self._text = self._text[:end], self._text[end:]
        try:
            json.loads(given)
        except (ValueError, RecursionError):
            self._text = self._head + given + self._text
            self._say(deltas, len(self._head) + end)
            self._state = self._content
            return
        self._begin(deltas)
        self._give(deltas, given)
        self._state = self._end

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

    def _end(self, deltas: Deltas) -> bool:
        found = self._notation.end.match(self._text, partial=True)
        if found is not None and found.partial:
            return False
        if found is not None:
            self._text = self._text[found.end() :]
        self._state = self._more if found is not None else self._content
        return True

    def _begin(self, deltas: Deltas) -> None:
        function = {"name": self._name, "arguments": ""}
        call = {"index": self.calls, "id": self._notation.new_id(), "type": "function", "function": function}
        deltas.append({"tool_calls": [call]})
        self.calls += 1
        self._after_call = True

    def _give(self, deltas: Deltas, arguments: str) -> None:
        if arguments:
            deltas.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": arguments}}]})

    def _say(self, deltas: Deltas, end: int) -> None:
        """The first `end` characters are text."""
        given, self._text = self._text[:end], self._text[end:]
        given = given.lstrip() if self._after_call else given
        if given:
            self._after_call = False
            deltas.append({"content": given})


def message_of(text: str, notation: Notation) -> dict[str, Any]:
    """The content and the calls of a whole answer, as an assistant's message."""
    reader = CallReader(notation)
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


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that the mark begins with."""
    return next((size for size in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:size])), 0)
