"""A terminal client: streams answers of an OpenAI-compatible endpoint and remembers the conversation."""

from __future__ import annotations

import json
import os
from typing import Any

import httpx

from tigerbot.errors import InputError, ServeError


class Client:
    """One conversation.

    Args:
        creativity: the dial, 0 to 1.
        verify: let the judge read the answer before it is shown.
    """

    def __init__(self, url: str, *, model: str, creativity: float, verify: bool) -> None:
        key = os.environ.get("TIGER_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(10, read=180))
        self._url, self._model = url, model
        self.creativity, self._verify = creativity, verify
        self.messages: list[dict[str, str]] = []

    def command(self, line: str) -> None:
        """A line as typed: `/creativity 0.8`, `/new`, or something to ask."""
        if line.startswith("/creativity"):
            try:
                self.creativity = min(1.0, max(0.0, float(line.split()[1])))
            except (IndexError, ValueError):
                print("wants a number from 0 to 1, e.g. /creativity 0.8")
            return
        if line == "/new":
            self.messages = []
            return
        try:
            self.ask(line)
        except ServeError as error:
            print(f"tiger: {error}")

    def ask(self, text: str) -> str:
        """Ask, print the answer as it comes, and return it.

        Raises:
            InputError: nothing was asked.
            ServeError: the endpoint cannot be reached or refuses.
        """
        if not text:
            raise InputError("nothing was asked", where="message", fix='e.g. tiger chat "你好"')
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {
            "model": self._model,
            "messages": asked,
            "creativity": self.creativity,
            "verify": self._verify,
            "stream": True,
        }
        said, verdict = "", ""
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServeError(_message(response), where=self._url, fix="is the address and TIGER_API_KEY right?")
                for line in response.iter_lines():
                    chunk = _chunk(line)
                    if "error" in chunk:
                        raise ServeError(chunk["error"]["message"], where=self._url, fix="ask again")
                    piece, verdict = _piece(chunk), (chunk.get("ensemble") or {}).get("verdict", verdict)
                    said += piece
                    print(piece, end="", flush=True)
        except httpx.HTTPError as error:
            raise ServeError(
                f"cannot be reached ({type(error).__name__})", where=self._url, fix="start one with `tiger serve SPEC`"
            ) from None
        print(f"   [{verdict}]" if verdict in ("rewritten", "flagged") else "", flush=True)
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said


def _chunk(line: str) -> dict[str, Any]:
    data = line.removeprefix("data: ")
    return json.loads(data) if line.startswith("data: ") and data != "[DONE]" else {}


def _piece(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _message(response: httpx.Response) -> str:
    try:
        return f"HTTP {response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
