"""A large file as parts of one S3 upload that survives the process: another one finds it and goes on.

A part counts as uploaded when its size and MD5 are those of the file's bytes at its place. This module knows nothing
about keys or manifests.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tigerbot.s3 import md5, pages, sent, sha256_base64, whole
from tigerbot.staging import MissingError

MOST_PARTS = 10_000


@dataclass(frozen=True)
class Upload:
    """An unfinished multipart upload. `call(function)` retries; `name` is the whole object key."""

    client: Any
    call: Callable[[Callable[[], Any]], Any]
    bucket: str
    name: str
    upload_id: str

    @classmethod
    def begin(cls, client: Any, call: Callable[..., Any], bucket: str, name: str, sha256: str) -> Upload:
        """Begin an upload whose object will carry the file's SHA-256."""

        def create() -> dict[str, Any]:
            answer = client.create_multipart_upload(
                Bucket=bucket, Key=name, Metadata={"sha256": sha256}, ChecksumAlgorithm="SHA256"
            )
            return whole(answer, "UploadId")

        return cls(client, call, bucket, name, call(create)["UploadId"])

    @property
    def _named(self) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self.name, "UploadId": self.upload_id}

    def abort(self) -> None:
        try:
            self.call(lambda: self.client.abort_multipart_upload(**self._named))
        except MissingError:
            return  # ended since it was listed

    def parts(self) -> dict[int, dict[str, Any]]:
        """What arrived before, by part number."""
        found: dict[int, dict[str, Any]] = {}
        for page in pages(self.call, self.client.list_parts, **self._named):
            found |= {part["PartNumber"]: part for part in page.get("Parts", [])}
        return found

    def send(self, number: int, data: bytes) -> dict[str, Any]:
        put = partial(sent, self.client.upload_part, data, **self._named, PartNumber=number)
        return _receipt(number, self.call(put), data)

    def complete(self, receipts: list[dict[str, Any]]) -> None:
        """Make the parts an object. Whether it is the right one is for the caller to look at: an answer that was lost
        on its way makes the next attempt fail although the object stands.
        """
        try:
            self.call(lambda: self.client.complete_multipart_upload(**self._named, MultipartUpload={"Parts": receipts}))
        except MissingError:
            return


def upload_parts(upload: Upload, local: Path, part_bytes: int, pool: Executor) -> None:
    """Send what is missing of a file and complete the upload. Parts that differ from the file are sent again."""
    size_bytes = local.stat().st_size
    part_bytes = max(part_bytes, -(-size_bytes // MOST_PARTS))
    known = upload.parts()

    def part(number: int) -> dict[str, Any]:
        data = _read(local, (number - 1) * part_bytes, part_bytes)
        before = known.get(number)
        if before and before["Size"] == len(data) and before["ETag"].strip('"') == md5(data):
            return _receipt(number, before, data)
        return upload.send(number, data)

    numbers = range(1, -(-size_bytes // part_bytes) + 1)
    upload.complete(list(pool.map(part, numbers)))


def _receipt(number: int, answer: dict[str, Any], data: bytes) -> dict[str, Any]:
    receipt = {"PartNumber": number, "ETag": answer["ETag"]}
    return receipt | ({"ChecksumSHA256": sha256_base64(data)} if answer.get("ChecksumSHA256") else {})


def _read(path: Path, start: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size_bytes)
