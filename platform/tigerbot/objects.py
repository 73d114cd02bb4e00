"""A store in an S3 bucket. Uploads go on where they were cut off, and what arrived is compared with what was sent.

Every call is bounded in time and retried with full jitter where a retry can help; a missing bucket, wrong keys or no
credentials are said at once. Needs `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` (or any other source boto3 knows)
and `AWS_ENDPOINT_URL` for a service other than AWS's own.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from tigerbot.errors import CorruptError, InputError, StorageError
from tigerbot.multipart import Upload, upload_parts
from tigerbot.s3 import DiffersError, connect, deleted, error_code, pages, retrying, sent
from tigerbot.staging import MissingError, disk_errors, fsync, publish, sha256_file, staged
from tigerbot.storage import MANIFEST, Entry, Manifest, ManifestFile, Store, files_below, safe_key

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class ObjectOptions:
    """How hard to try. `part_bytes` is also the largest object sent in one piece (S3 wants at least 5 MiB parts)."""

    part_bytes: int = 16 * 1024 * 1024
    workers: int = 4
    attempts: int = 6
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep


class ObjectStore(Store):
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, uri: str, options: ObjectOptions | None = None) -> None:
        super().__init__(uri)
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise InputError("names no bucket", where=uri, fix="write s3://bucket/prefix")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.options = options or ObjectOptions()
        self._client = connect(self.options.connect_timeout_s, self.options.read_timeout_s, self.options.workers)

    def put_file(self, local: str | Path, key: str) -> None:
        with disk_errors(local):
            self._put(Path(local), key)

    def get_file(self, key: str, local: str | Path) -> None:
        target = Path(local)
        with disk_errors(target), staged(target) as stage:
            for last in (False, True):
                sha256 = self._download(key, stage)
                if sha256 in (None, sha256_file(stage)):
                    break
                stage.unlink()
                if last:
                    raise CorruptError("differs from its checksum", where=self.at(key), fix="store it again")
            fsync(stage)
            publish(stage, target)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._put_bytes(key, data, hashlib.sha256(data).hexdigest())

    def get_bytes(self, key: str) -> bytes:
        def get() -> bytes:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            data = answer["Body"].read()
            if answer["Metadata"].get("sha256") not in (None, hashlib.sha256(data).hexdigest()):
                raise DiffersError("differs from its checksum")
            return data

        return self._call(get, key)

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        def get() -> bytes:
            wanted = f"bytes={begin}-{end - 1}"
            return self._client.get_object(Bucket=self.bucket, Key=self._name(key), Range=wanted)["Body"].read()

        return self._call(get, key)

    def list(self, prefix: str = "") -> list[Entry]:
        name = self._name(prefix) if prefix else self.prefix
        found: list[dict[str, Any]] = []
        for page in pages(self._caller(prefix), self._client.list_objects_v2, Bucket=self.bucket, Prefix=name):
            found += page.get("Contents", [])
        mine = (one for one in found if _at_or_below(one["Key"], name))
        entries = [Entry(one["Key"].removeprefix(self.prefix), one["Size"]) for one in mine]
        return sorted(entries, key=lambda entry: entry.key)

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    def delete(self, prefix: str) -> None:
        keys = [entry.key for entry in self.list(safe_key(prefix))]
        manifests = [key for key in keys if key.rpartition("/")[2] == MANIFEST]
        self._delete(manifests)
        self._delete([key for key in keys if key not in manifests])
        for upload in self._uploads(prefix):
            upload.abort()

    def commit_folder(self, local_folder: str | Path, key: str) -> Manifest:
        source = Path(local_folder)
        names = files_below(source)
        with disk_errors(source):
            files = tuple(_described(source, name) for name in names)
            manifest = Manifest(files=files)
            held = {entry.key for entry in self.list(safe_key(key))}
            if f"{key}/{MANIFEST}" in held:
                if key in self.committed(key) and self.manifest(key) == manifest:
                    return manifest
                self._delete([f"{key}/{MANIFEST}"])
            self._delete(sorted(held - {f"{key}/{name}" for name in [*names, MANIFEST]}))
            for file in files:
                if f"{key}/{file.path}" not in held or not self._has(f"{key}/{file.path}", file):
                    self._put(source / file.path, f"{key}/{file.path}", file.sha256)
        self.put_bytes(f"{key}/{MANIFEST}", manifest.to_bytes())
        return manifest

    def _sweep(self, prefix: str, newest: str) -> list[str]:
        stale = [upload for upload in self._uploads(prefix) if upload.name.removeprefix(self.prefix) < f"{newest}/"]
        for upload in stale:
            upload.abort()
        return []

    def _name(self, key: str) -> str:
        return self.prefix + safe_key(key)

    def _call(self, call: Callable[[], Any], key: str) -> Any:
        return retrying(call, where=self.at(key), attempts=self.options.attempts, sleep=self.options.sleep)

    def _caller(self, key: str) -> Callable[[Callable[[], Any]], Any]:
        return lambda call: self._call(call, key)

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._call(lambda: self._client.head_object(Bucket=self.bucket, Key=self._name(key)), key)
        except MissingError:
            return None

    def _has(self, key: str, file: ManifestFile) -> bool:
        head = self._head(key)
        return bool(head and head["ContentLength"] == file.size_bytes and head["Metadata"].get("sha256") == file.sha256)

    def _put(self, local: Path, key: str, sha256: str | None = None) -> None:
        before = local.stat()
        sha256 = sha256 or sha256_file(local)
        if before.st_size <= self.options.part_bytes:
            self._put_bytes(key, local.read_bytes(), sha256)
        else:
            self._put_parts(local, key, sha256)
        after = local.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise StorageError("was changed while it was stored", where=str(local), fix="store it when it is finished")

    def _put_bytes(self, key: str, data: bytes, sha256: str) -> None:
        named = {"Bucket": self.bucket, "Key": self._name(key), "Metadata": {"sha256": sha256}}
        self._call(partial(sent, self._client.put_object, data, **named), key)

    def _put_parts(self, local: Path, key: str, sha256: str) -> None:
        file = ManifestFile(path=key, size_bytes=local.stat().st_size, sha256=sha256)
        # An upload that was begun for other bytes ends as an object of the wrong checksum: then, all anew.
        for resume in (True, False):
            uploads = self._uploads(key)
            kept = uploads[-1] if uploads and resume else None
            for upload in uploads:
                if upload is not kept:
                    upload.abort()
            begun = kept or Upload.begin(self._client, self._caller(key), self.bucket, self._name(key), sha256)
            with ThreadPoolExecutor(self.options.workers) as pool:
                upload_parts(begun, local, self.options.part_bytes, pool)
            if self._has(key, file):
                return
        raise CorruptError("what arrived differs from what was sent", where=self.at(key), fix="store it again")

    def _uploads(self, prefix: str) -> list[Upload]:
        """Unfinished uploads at or below a prefix, oldest first."""
        name = self._name(prefix) if prefix else self.prefix
        found: list[dict[str, Any]] = []
        for page in pages(self._caller(prefix), self._client.list_multipart_uploads, Bucket=self.bucket, Prefix=name):
            found += page.get("Uploads", [])
        mine = sorted((one for one in found if _at_or_below(one["Key"], name)), key=lambda one: one["Initiated"])
        return [
            Upload(
                self._client,
                self._caller(one["Key"].removeprefix(self.prefix)),
                self.bucket,
                one["Key"],
                one["UploadId"],
            )
            for one in mine
        ]

    def _delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), 1000):
            named = [{"Key": self._name(key)} for key in keys[start : start + 1000]]

            self._call(partial(deleted, self._client, self.bucket, named), keys[start])

    def _download(self, key: str, path: Path) -> str | None:
        """Fetch an object, going on after a cut where it stopped; the SHA-256 it was stored with, if it has one."""
        path.touch()

        def download() -> str | None:
            have = path.stat().st_size
            begin = {"Range": f"bytes={have}-", "IfMatch": etag[0]} if have else {}
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key), **begin)
            except ClientError as error:
                if have and error_code(error) in ("PreconditionFailed", "InvalidRange", "412", "416"):
                    os.truncate(path, 0)
                    raise DiffersError("was replaced while it was read") from None
                raise
            etag[:] = [answer["ETag"]]
            with path.open("ab") as file:
                for block in answer["Body"].iter_chunks(_READ_BYTES):
                    file.write(block)
            return answer["Metadata"].get("sha256")

        etag: list[str] = []
        return self._call(download, key)


def _at_or_below(name: str, prefix: str) -> bool:
    return not prefix or prefix.endswith("/") or name == prefix or name.startswith(f"{prefix}/")


def _described(source: Path, name: str) -> ManifestFile:
    path = source / name
    return ManifestFile(path=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
