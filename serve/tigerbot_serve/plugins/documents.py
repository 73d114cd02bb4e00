"""Texts to look things up in: JSONL ({text, title, id, url, aliases}) or plain text, a file or a folder of them.

Plain text is cut at empty lines; a passage knows where in its file it stands. Words are Latin letters and digits in
lower case; Chinese, which writes no spaces, gives its characters and pairs of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tigerbot.errors import DataError

SUFFIXES = (".jsonl", ".txt", ".md")
_RUN = re.compile(r"[一-鿿]+|[^\W_一-鿿]+")
_PARAGRAPH = re.compile(r"(?:[^\n]+\n?)+")


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    title: str = ""
    url: str = ""
    aliases: tuple[str, ...] = ()
    start: int = 0  # of the text in its file; 0 where it is a JSONL line's own


def read_documents(path: str | Path) -> list[Document]:
    """Every document of a file or folder, in order.

    Raises:
        DataError: nothing is there, or a line is not an object with text.
    """
    place = Path(path)
    files = sorted(f for f in place.rglob("*") if f.suffix in SUFFIXES) if place.is_dir() else [place]
    try:
        found = [document for file in files for document in _of_file(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(place), fix="give UTF-8 JSONL or text") from None
    if not found:
        raise DataError("holds no text", where=str(place), fix=f"give {', '.join(SUFFIXES)} files with text")
    return found


def words(text: str) -> list[str]:
    """The words of a text, as an index counts them."""
    found: list[str] = []
    for run in _RUN.findall(text.lower()):
        if "一" <= run[0] <= "鿿":
            found += run
            found += (run[at : at + 2] for at in range(len(run) - 1))
        else:
            found.append(run)
    return found


def _of_file(file: Path) -> Iterator[Document]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _of_line(line, f"{file.name}:{number}", f"{file}:{number}")
        return
    for paragraph in _PARAGRAPH.finditer(text):
        body = paragraph.group().strip()
        if body:
            yield Document(f"{file.name}:{paragraph.start()}", body, file.stem, start=paragraph.start())


def _of_line(line: str, name: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError("is not JSON", where=where, fix="write one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError("has no text", where=where, fix='write {"text": "...", "title": "...", "url": "..."}')
    aliases = row.get("aliases") or ()
    if not isinstance(aliases, list | tuple) or not all(isinstance(alias, str) for alias in aliases):
        raise DataError("aliases are no list of texts", where=where, fix='write "aliases": ["..."]')
    title, url = (str(row.get(field) or "") for field in ("title", "url"))
    return Document(str(row.get("id") or name), row["text"], title, url, tuple(aliases))
