"""Bounds of a JSON text, checked on its bytes as they arrive: depth, how many objects and arrays, how many messages.

A body that breaks a bound is refused with the piece that breaks it, before the rest is read and before it is parsed.
This is no parser: text that is not JSON is left for the parser to refuse.
"""

from __future__ import annotations

import re

# A string, whole; brackets; a string that has begun and goes on in the next piece.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]|"(?:[^"\\]++|\\.)*+\\?\Z', re.S)
_REST = re.compile(rb'(?:[^"\\]++|\\.)*+', re.S)

MAX_CONTAINERS = 20_000


class OutOfBounds(Exception):
    """Which bound was broken, as a sentence about the body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


class Scanner:
    """Feed it the body piece by piece.

    Args:
        max_depth: objects and arrays inside one another.
        max_messages: objects directly in the top object's `messages`.
    """

    def __init__(self, max_depth: int, max_messages: int) -> None:
        self._max_depth, self._max_messages = max_depth, max_messages
        self._depth = self._containers = self._messages = 0
        self._name = b""  # the last string directly in the top object: at a bracket, the name of what it opens
        self._in_messages = False
        self._in_string = self._after_backslash = False
        self._unread: list[bytes] | None = []  # too few brackets so far to break any bound
        self._brackets = 0

    def feed(self, data: bytes) -> None:
        """
        Raises:
            OutOfBounds: as soon as the text so far breaks a bound.
        """
        if self._unread is not None:
            self._unread.append(data)
            self._brackets += data.count(b"[") + data.count(b"{")
            if self._brackets <= min(self._max_depth, self._max_messages):
                return
            data, self._unread = b"".join(self._unread), None
        start = self._string_rest(data) if self._in_string else 0
        for found in _TOKEN.finditer(data, start):
            token = found.group()
            if token[0] == 0x22:
                self._string(token)
            elif token in b"[{":
                self._open(token)
            else:
                self._depth -= 1
                if self._depth == 1:
                    self._in_messages = False

    def _string_rest(self, data: bytes) -> int:
        """Where the string that began in an earlier piece ends in this one."""
        at = 1 if self._after_backslash and data else 0
        if not data:
            return 0
        found = _REST.match(data, at)
        assert found is not None  # it matches nothing, too
        end = found.end()
        if end < len(data) and data[end] == 0x22:
            self._in_string = self._after_backslash = False
            return end + 1
        self._after_backslash = end < len(data)  # only a backslash at the very end stops it there
        return len(data)

    def _string(self, token: bytes) -> None:
        whole = len(token) > 1 and token[-1] == 0x22 and not _odd_backslashes(token[:-1])
        if not whole:
            self._in_string, self._after_backslash = True, _odd_backslashes(token)
        if self._depth == 1:
            self._name = token[1:-1] if whole else b""

    def _open(self, token: bytes) -> None:
        self._containers += 1
        self._depth += 1
        if self._depth > self._max_depth:
            raise OutOfBounds(f"the body is nested deeper than {self._max_depth} levels")
        if self._containers > MAX_CONTAINERS:
            raise OutOfBounds(f"the body holds more than {MAX_CONTAINERS:,} objects and arrays")
        if self._depth == 2:
            self._in_messages = token == b"[" and self._name == b"messages"
        elif self._depth == 3 and self._in_messages:
            self._messages += 1
            if self._messages > self._max_messages:
                raise OutOfBounds(f"messages: more than {self._max_messages} messages", "messages")


def _odd_backslashes(text: bytes) -> bool:
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
