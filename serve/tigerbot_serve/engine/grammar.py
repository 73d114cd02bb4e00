"""Answers held to a grammar: JSON of a schema, or calls of tools. Compiled once, followed token by token.

llguidance does both; a compiled grammar is remembered by its hash, since the same schema comes with every request of
an application. Compiling is bounded and is called off the engine's thread. This module knows nothing about torch.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from tigerbot.chat import end_token_ids
from tigerbot.errors import InputError
from tigerbot.spec import GrammarSpec

# At most one blank, or a new line and its indentation: a model cannot fill its answer with white space.
WHITESPACE = r" ?|\n {0,24}"
_LIMITS = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)


class Unfollowed(Exception):
    """A grammar that compiled became too large while a text followed it."""


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Nothing can follow, so the answer is whole."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, size: int) -> np.ndarray:
        """Which of the first `size` tokens may come next, bool.

        Raises:
            Unfollowed: the parser reached its limits.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error() or not bits[:size].any():
            raise Unfollowed(_first_line(self._matcher.get_error()) or "no token can follow")
        allowed = np.zeros(size, dtype=bool)
        allowed[: len(bits)] = bits[:size]
        return allowed

    def take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


class Grammar:
    """A compiled grammar and what it was compiled from. Immutable: every text begins with a matcher of its own."""

    def __init__(self, matcher: LLMatcher, source: str) -> None:
        self._matcher, self.source = matcher, source

    def begin(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. Callable from any thread; one compiles at a time."""

    def __init__(self, tokenizer: Any, spec: GrammarSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self._compiler: LLTokenizer | None = None
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, source: str) -> Grammar | None:
        """The grammar of this source if it was compiled before: no work at all."""
        with self._lock:
            return self._known(_key(source))

    def compile(self, source: str) -> Grammar:
        """The grammar of a source that `json_source` made, or of a Lark text.

        Raises:
            InputError: the library cannot follow it; it says why.
        """
        key = _key(source)
        with self._lock:
            if (found := self._known(key)) is not None:
                return found
            if self._compiler is None:  # a second of work for a large vocabulary, and only for those who ask
                self._compiler = from_tokenizer(self._tokenizer, eos_token=end_token_ids(self._tokenizer))
            matcher = LLMatcher(self._compiler, source, log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise InputError(_first_line(matcher.get_error()), where="schema", fix="simplify it")
            grammar = self._kept[key] = Grammar(matcher, source)
            while len(self._kept) > self._spec.cached:
                self._kept.popitem(last=False)
            return grammar

    def _known(self, key: bytes) -> Grammar | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found


def json_source(schema: dict[str, Any]) -> str:
    """The source of the JSON texts of a schema (see `following`)."""
    return LLMatcher.grammar_from_json_schema(schema)


def following(schema: dict[str, Any], spec: GrammarSpec, *, strict: bool) -> dict[str, Any]:
    """A user's schema as it is followed. Not strict: keywords that cannot be followed are left out of account.

    Raises:
        InputError: it is larger or deeper than a schema may be.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > spec.max_schema_bytes:
        raise InputError(f"has {size:,} bytes, at most {spec.max_schema_bytes:,} are taken", where="schema")
    if (depth := _depth(schema)) > spec.max_depth:
        raise InputError(f"is {depth} levels deep, at most {spec.max_depth} are taken", where="schema")
    return schema | {"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}}


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def _key(source: str) -> bytes:
    return hashlib.sha256(source.encode()).digest()


def _first_line(text: str) -> str:
    """What the library says, as one short line without the grammar that it quotes below."""
    first, *others = text.splitlines() or [""]
    return " ".join([first, *(line for line in others if line.startswith("error:"))])[:300]
