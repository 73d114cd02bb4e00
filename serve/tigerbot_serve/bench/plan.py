"""What a load run does: where, how many, how fast, with which bodies. Plain data that crosses to worker processes.

A plan is bounded in time and in requests, whatever is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tigerbot.errors import InputError

MAX_REQUESTS = 1_000_000
MAX_DURATION_S = 3600.0
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PROMPTS = (
    "Name three rivers and one thing each is known for.",
    "写一首关于月亮的小诗。",
    "Explain in two sentences why the sky is blue.",
    "请用三句话介绍杭州的西湖。",
    "Rewrite politely: send me the report today.",
    "把下面这句话译成英文：细雨落在老城的屋檐上。",
    "What should a first aid kit contain?",
    "给一位刚入职的同事写一封简短的欢迎信。",
)


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        clients: closed loop: so many clients, each asks again when it was answered. 0: open loop.
        rate: open loop: requests arrive as a Poisson process of this many a second, answered or not.
        bodies: asked in turn, from `begin` on.
        max_in_flight: open loop: a request above it waits for a free connection, and its waiting counts.
        timeout_s: of one request, from when it is sent.
    """

    url: str
    bodies: tuple[str, ...]
    clients: int = 0
    rate: float = 0.0
    duration_s: float = MAX_DURATION_S
    requests: int = MAX_REQUESTS
    timeout_s: float = 120.0
    max_in_flight: int = 512
    stream: bool = True
    seed: int = 0
    begin: int = 0
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def loop(self) -> Literal["closed", "open"]:
        return "closed" if self.clients else "open"

    def share(self, index: int, processes: int) -> Plan:
        """The part of one of several processes. Poisson processes add up to a Poisson process."""

        def part(total: int) -> int:
            return total // processes + (index < total % processes)

        return replace(
            self,
            clients=part(self.clients),
            rate=self.rate / processes,
            requests=part(self.requests),
            max_in_flight=max(1, part(self.max_in_flight)),
            seed=self.seed + index,
            begin=index,
        )


def target(url: str, endpoint: str) -> str:
    """The full address of an endpoint below a server's address (`http://host:port`, with or without `/v1`).

    Raises:
        InputError: it is no HTTP address.
    """
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise InputError("is no HTTP address", where=f"URL: {url}", fix="e.g. http://127.0.0.1:8000")
    if parts.username is not None:
        raise InputError("holds credentials", where="URL", fix="put the key in an environment variable: --key-env")
    base = url.rstrip("/").removesuffix("/v1")
    return base + PATHS[endpoint]


def body_texts(
    endpoint: str, prompts: tuple[Any, ...], *, model: str, stream: bool, max_tokens: int, fields: Mapping[str, Any]
) -> tuple[str, ...]:
    """One JSON body a prompt; a prompt is a text or a list of messages. `fields` of None are left out of it."""
    shared: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "stream": stream}
    if stream:
        shared["stream_options"] = {"include_usage": True}
    bodies = []
    for prompt in prompts:
        if endpoint == "chat":
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            own: dict[str, Any] = {"messages": asked}
        else:
            own = {"prompt": prompt}
        body = {name: value for name, value in {**shared, **own, **fields}.items() if value is not None}
        bodies.append(json.dumps(body, ensure_ascii=False))
    return tuple(bodies)


def read_prompts(path: Path, endpoint: str) -> tuple[Any, ...]:
    """Prompts from a JSONL file: a string a line, or an object with `prompt` or `messages`.

    Raises:
        InputError: the file is not there, is empty, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read as UTF-8 text", where=str(path), fix="give a JSONL file") from error
    found = [_prompt(line, f"{path}:{number}", endpoint) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError("holds no prompt", where=str(path), fix='write one a line, e.g. {"prompt": "你好"}')
    return tuple(found)


def _prompt(line: str, where: str, endpoint: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError:
        raise InputError("is not JSON", where=where, fix='e.g. {"prompt": "你好"}') from None
    if isinstance(value, dict):
        value = value.get("messages") or value.get("prompt")
    if not (isinstance(value, str) or (isinstance(value, list) and endpoint == "chat")) or not value:
        wants = "`prompt` or `messages`" if endpoint == "chat" else "`prompt`"
        raise InputError(f"has no {wants}", where=where, fix='e.g. {"prompt": "你好"}')
    return value


def extra_fields(given: list[str]) -> dict[str, Any]:
    """`NAME=JSON` pairs as fields of the body.

    Raises:
        InputError: one is not of that form.
    """
    found = {}
    for one in given:
        name, equals, text = one.partition("=")
        try:
            found[name] = json.loads(text)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise InputError("wants NAME=JSON", where=f"--field {one}", fix="e.g. --field verify=false")
    return found


def key_headers(variable: str) -> tuple[tuple[str, str], ...]:
    """The Authorization header of the key in an environment variable; none where it is not set."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or any(character.isspace() for character in key):
        raise InputError("holds no key", where=variable, fix="a key is printable ASCII, one")
    return (("authorization", f"Bearer {key}"),) if key else ()
