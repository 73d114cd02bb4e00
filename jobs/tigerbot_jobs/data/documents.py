"""Files to clean rows. Every reader counts what it read and dropped, and why; a bad row never stops it.

Rows are strings (text) or lists of messages (chat). Files are JSONL, plain, gz or zst, read line by line in bounded
memory: a single line of a gigabyte is counted and skipped, not held.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash
import zstandard

from tigerbot.chat import Message
from tigerbot.errors import DataError
from tigerbot.spec import CorpusSource

ROLES = {"system", "user", "assistant"}
Row = str | list[Message]
T = TypeVar("T")


@dataclass
class Report:
    """Rows read, rows kept, rows dropped by reason, and where the bad ones are."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """Rows that are wrong, not merely unwanted."""
        return sum(count for reason, count in self.dropped.items() if reason not in ("duplicate", "too short"))

    def reject(self, file: str, line: int, reason: str) -> None:
        self.dropped[reason] += 1
        if len(self.rejects) < 10_000:
            self.rejects.append({"file": file, "line": line, "reason": reason})

    def as_dict(self) -> dict[str, Any]:
        return {"read": self.read, "kept": self.kept, "dropped": dict(self.dropped)}


def files_of(source: CorpusSource) -> list[Path]:
    """The files a source names, sorted.

    Raises:
        DataError: no such file, or an empty one.
    """
    assert source.path is not None
    found = sorted(Path(path) for path in glob.glob(source.path, recursive=True) if Path(path).is_file())
    if not found:
        raise DataError("no such file", where=source.path, fix="check the path, or the glob")
    for path in found:
        if path.stat().st_size == 0:
            raise DataError("is empty", where=str(path), fix="leave it out")
    return found


def read_rows(path: Path, source: CorpusSource, report: Report, max_row_bytes: int) -> Iterator[Row]:
    """Rows of one file that are well formed.

    Raises:
        DataError: the file is binary, or not a whole gz or zst stream.
    """
    try:
        with _opened(path) as stream:
            for number, line in _lines(stream, max_row_bytes):
                report.read += 1
                row = _parsed(line, source)
                if isinstance(row, _Bad):
                    report.reject(str(path), number, row.reason)
                else:
                    yield row
    except (gzip.BadGzipFile, EOFError, zstandard.ZstdError, OSError) as error:
        raise DataError(f"cannot be read to its end ({error})", where=str(path), fix="fetch the file again") from None


def clean(rows: Iterator[Row], source: CorpusSource, report: Report) -> Iterator[tuple[bytes, Row]]:
    """Normalise, drop the short; each row comes with the digest that its exact duplicates share."""
    for row in rows:
        tidy = (
            _tidy(row) if isinstance(row, str) else [Message(role=m["role"], content=_tidy(m["content"])) for m in row]
        )
        key = tidy if isinstance(tidy, str) else json.dumps(tidy, ensure_ascii=False)
        if len(key) < source.min_chars or not key.strip():
            report.dropped["too short"] += 1
            continue
        yield xxhash.xxh3_128_digest(" ".join(key.casefold().split()).encode()), tidy


def unique(rows: Iterator[tuple[bytes, T]], source: CorpusSource, report: Report) -> Iterator[T]:
    """The first row of every digest, where the source wants that."""
    seen: set[bytes] = set()
    for digest, row in rows:
        if source.deduplicate and digest in seen:
            report.dropped["duplicate"] += 1
            continue
        seen.add(digest)
        report.kept += 1
        yield row


@dataclass(frozen=True)
class _Bad:
    reason: str


def _parsed(line: bytes | None, source: CorpusSource) -> Row | _Bad:
    if line is None:
        return _Bad("too long")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Bad("not UTF-8")
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
        return _Bad("not JSON")
    if not isinstance(value, dict):
        return _Bad("not an object")
    return _chat(value) if source.format == "chat" else _text(value, source.field)


def _text(value: dict[str, Any], name: str) -> str | _Bad:
    text = value.get(name)
    return text if isinstance(text, str) else _Bad(f"no text in field {name}")


def _chat(value: dict[str, Any]) -> list[Message] | _Bad:
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return _Bad("no messages")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            return _Bad("a message wants role (system, user, assistant) and content")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        return _Bad("no assistant turn")
    return [Message(role=m["role"], content=m["content"]) for m in messages]


def _tidy(text: str) -> str:
    """NFC, no control characters but newline and tab, no trailing spaces."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
    return "\n".join(line.rstrip() for line in kept.split("\n")).strip("\n")


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    raw = path.open("rb")
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))  # type: ignore[arg-type]
    if b"\0" in raw.read(4096):
        raw.close()
        raise DataError("is a binary file", where=str(path), fix="give JSONL: one JSON object a line")
    raw.seek(0)
    return raw


def _lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one longer than `limit`, of which never more than `limit` bytes are held."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            yield number, None
        elif line.strip():
            yield number, line
