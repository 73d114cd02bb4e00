"""`kind: corpus`: raw text to token shards, source by source. A finished source is kept; a killed one starts over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.chat import Message, encode_chat, encode_plain
from tigerbot.cluster import connect
from tigerbot.errors import DataError
from tigerbot.models import load_tokenizer, tokenizer_hash
from tigerbot.progress import stage
from tigerbot.runs import Run, read_json, write_json, write_text
from tigerbot.spec import CorpusSource, CorpusSpec
from tigerbot.tokens import write_shards
from tigerbot_jobs.data.documents import Report, Row, clean, files_of, read_rows, unique
from tigerbot_jobs.data.pack import Document, pack
from tigerbot_jobs.data.parallel import read_files
from tigerbot_jobs.data.sources import world_rows
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_jobs.data.world import languages_of


def run(run: Run) -> dict[str, Any]:
    """Write `tokenizer/`, `tokens/<source>/`, `report.json` and `rejects.jsonl` into the run's folder."""
    spec = run.spec
    assert isinstance(spec, CorpusSpec)
    for source in spec.sources:
        if source.path is not None:
            files_of(source)  # a missing file is said before anything is done
    cluster = connect(None, num_cpus=os.cpu_count()) if any(map(_is_large, spec.sources)) else None
    try:
        return run.finish(_packed(run, spec))
    finally:
        if cluster is not None:
            cluster.stop()


def _packed(run: Run, spec: CorpusSpec) -> dict[str, Any]:
    tokenizer_folder = _tokenizer(run, spec)
    report = read_json(run.folder / "report.json", {})
    with stage("packing tokens", total=len(spec.sources), unit="sources") as shown:
        for source in spec.sources:
            folder = run.folder / "tokens" / source.name
            if source.name not in report or not (folder / "manifest.json").exists():
                report[source.name] = _pack_source(run, spec, source, tokenizer_folder, folder)
                write_json(run.folder / "report.json", report)
            shown.advance(1, source.name)
    for name, counts in report.items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
        print(
            f"  {name}: {counts['tokens']:,} tokens of {counts['kept']:,} rows"
            + (f"; dropped {dropped}" if dropped else "")
        )
    return {"tokenizer": str(tokenizer_folder), "sources": report}


def pack_file(path: str, format: str, tokenizer_folder: str, sequence_length: int, folder: Path) -> Path:
    """Pack one JSONL file for a train spec that names it directly."""
    source = CorpusSource.model_validate({"name": "file", "path": path, "format": format})
    report = Report()
    rows = unique(clean(_file_rows(source, report, 16_000_000), source, report), source, report)
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = [_document(row, tokenizer) for row in rows]
    _write(documents, tokenizer_folder, sequence_length, folder, where=path)
    return folder


def _tokenizer(run: Run, spec: CorpusSpec) -> Path:
    if spec.tokenizer.path is not None:
        load_tokenizer(spec.tokenizer.path)
        return Path(spec.tokenizer.path).resolve()
    folder = run.folder / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        assert spec.tokenizer.vocab_size is not None
        with stage(f"training a tokenizer of {spec.tokenizer.vocab_size:,} tokens"):
            texts = (text for source in spec.sources if source.split == "train" for text in _texts(source, spec))
            train_tokenizer(texts, spec.tokenizer.vocab_size, folder)
    return folder


def _pack_source(
    run: Run, spec: CorpusSpec, source: CorpusSource, tokenizer_folder: Path, folder: Path
) -> dict[str, Any]:
    report = Report()
    # All rows are read before anything is written: shards that stand are shards whose rows were good enough.
    documents = list(_documents(source, spec, report, str(tokenizer_folder)))
    if report.rejects:
        lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in report.rejects)
        write_text(run.folder / f"rejects-{source.name}.jsonl", lines)
    if report.bad > spec.max_bad_rows * max(report.read, 1):
        raise DataError(
            f"{report.bad:,} of {report.read:,} rows are bad ({dict(report.dropped)})",
            where=str(source.path),
            fix=f"see {run.folder}/rejects-{source.name}.jsonl, or raise max_bad_rows",
        )
    tokens = _write(documents, str(tokenizer_folder), spec.sequence_length, folder, where=source.path or source.name)
    return report.as_dict() | {"tokens": tokens}


def _documents(source: CorpusSource, spec: CorpusSpec, report: Report, tokenizer_folder: str) -> Iterator[Document]:
    """Token ids of every row: in this process, or through Ray Data where there is more than one file."""
    if _is_large(source):
        files = files_of(source)
        found = read_files(files, source, tokenizer_folder, _document, spec.max_row_bytes, report)
        yield from unique(found, source, report)
        return
    tokenizer = load_tokenizer(tokenizer_folder)
    for row in _rows(source, spec, report):
        yield _document(row, tokenizer)


def _is_large(source: CorpusSource) -> bool:
    return source.path is not None and len(files_of(source)) > 1


def _write(documents: list[Document], tokenizer_folder: str, sequence_length: int, folder: Path, *, where: str) -> int:
    tokenizer = load_tokenizer(tokenizer_folder)
    if not documents:
        raise DataError("holds no usable row", where=where, fix="look at its rows, or at min_chars")
    sequences = pack(documents, sequence_length, pad_id=tokenizer.pad_token_id)
    write_shards(
        folder,
        sequences,
        sequence_length,
        tokenizer_hash=tokenizer_hash(tokenizer_folder),
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    return sum(len(document.ids) for document in documents)


def _document(row: Row, tokenizer: Any) -> Document:
    if isinstance(row, str):
        ids = [tokenizer.bos_token_id, *encode_plain(tokenizer, row), tokenizer.eos_token_id]
        return Document(np.array(ids, np.int32), np.ones(len(ids), bool))
    ids, loss = encode_chat(tokenizer, row)
    return Document(np.array(ids, np.int32), np.array(loss, bool))


def _rows(source: CorpusSource, spec: CorpusSpec, report: Report) -> Iterator[Row]:
    if source.world is not None:
        for row in world_rows(source.world, source.split, spec.seed, languages_of(source.lang)):
            report.read += 1
            report.kept += 1
            yield row
        return
    yield from unique(clean(_file_rows(source, report, spec.max_row_bytes), source, report), source, report)


def _file_rows(source: CorpusSource, report: Report, max_row_bytes: int) -> Iterator[Row]:
    for path in files_of(source):
        yield from read_rows(path, source, report, max_row_bytes)


def _texts(source: CorpusSource, spec: CorpusSpec) -> Iterator[str]:
    for row in _rows(source, spec, Report()):
        yield row if isinstance(row, str) else "\n".join(_contents(row))


def _contents(row: list[Message]) -> list[str]:
    return [message["content"] for message in row]
