"""Many files at once, through Ray Data: every file is read, cleaned and tokenised in a task of its own.

Rows come back in the order of the files and their lines, so that the shards are the same as from one process. Exact
duplicates are found by the driver, which sees all digests; a row is small (a digest and packed arrays).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.errors import DataError
from tigerbot.models import load_tokenizer
from tigerbot.spec import CorpusSource
from tigerbot_jobs.data.documents import Report, Row, clean, read_rows
from tigerbot_jobs.data.pack import Document

_ROWS = 1_000  # of a file in one block
Encode = Callable[[Row, Any], Document]


def read_files(
    files: list[Path],
    source: CorpusSource,
    tokenizer_folder: str,
    encode: Encode,
    max_row_bytes: int,
    report: Report,
) -> Iterator[tuple[bytes, Document]]:
    """(digest, document) of every clean row of the files, in order; `report` is complete at the end.

    Raises:
        DataError: one of the files cannot be read to its end.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def read(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        tokenizer = load_tokenizer(tokenizer_folder)
        for path in batch["path"].tolist():
            yield from _blocks(Path(path), source, tokenizer, encode, max_row_bytes)

    paths = [{"path": str(path.absolute())} for path in files]
    blocks = ray.data.from_items(paths, override_num_blocks=len(paths)).map_batches(read, batch_size=1)  # type: ignore[arg-type]
    for block in blocks.iter_batches(batch_size=None, batch_format="numpy"):
        for digest, ids, loss, about in zip(block["digest"], block["ids"], block["loss"], block["about"], strict=True):
            if about:
                _merge(report, json.loads(about))
            else:
                yield digest, Document(np.frombuffer(ids, np.int32), np.frombuffer(loss, bool))


def _blocks(
    path: Path, source: CorpusSource, tokenizer: Any, encode: Encode, max_row_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """A file as blocks of rows; the last row says what was read and dropped, or why it broke off."""
    report, rows = Report(), []
    problem = None
    try:
        for digest, row in clean(read_rows(path, source, report, max_row_bytes), source, report):
            document = encode(row, tokenizer)
            ids, loss = np.asarray(document.ids, np.int32), np.asarray(document.loss, bool)
            rows.append((digest, ids.tobytes(), loss.tobytes(), ""))
            if len(rows) == _ROWS:
                yield _block(rows)
                rows = []
    except DataError as error:
        problem = (error.what, error.where, error.fix)
    about = {"read": report.read, "dropped": report.dropped, "rejects": report.rejects, "problem": problem}
    yield _block([*rows, (b"", b"", b"", json.dumps(about))])


def _block(rows: list[tuple[bytes, bytes, bytes, str]]) -> dict[str, np.ndarray]:
    digest, ids, loss, about = (np.array(column, dtype=object) for column in zip(*rows, strict=True))
    return {"digest": digest, "ids": ids, "loss": loss, "about": about}


def _merge(report: Report, about: dict[str, Any]) -> None:
    if about["problem"]:
        what, where, fix = about["problem"]
        raise DataError(what, where=where, fix=fix)
    report.read += about["read"]
    report.dropped.update(about["dropped"])
    report.rejects += about["rejects"]
