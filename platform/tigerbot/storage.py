"""One way to reach files: a folder or `s3://bucket/prefix`, and folders that are there whole or not at all.

`open_store(uri)` gives a `Store`. A folder is committed with a manifest (every file's size and SHA-256) written last,
and fetched verified: whoever reads sees a whole checkpoint or none, whatever died in between. One writer works on a
key at a time; any number read. This module knows nothing about what the files hold.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from tigerbot.errors import CorruptError, InputError, StorageError
from tigerbot.staging import STAGED, MissingError, disk_errors, fsync_folder, publish, sha256_file, staged

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
DAMAGED = "DAMAGED.json"  # a manifest whose files were found to differ from it

__all__ = [
    "Entry",
    "Manifest",
    "ManifestFile",
    "MissingError",
    "Store",
    "fsync_folder",
    "open_store",
    "sha256_file",
]


@dataclass(frozen=True)
class Entry:
    key: str
    size_bytes: int


class ManifestFile(BaseModel):
    """One file of a committed folder; `path` is relative to it, with forward slashes."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a committed folder holds. A newer `format_version` than this code's is refused."""

    model_config = ConfigDict(frozen=True)
    format_version: int = FORMAT_VERSION
    files: tuple[ManifestFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Manifest:
        """Raises: CorruptError: not a manifest. StorageError: written by a newer version."""
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError:
            raise CorruptError(f"{MANIFEST} is not a manifest", where=where, fix="commit the folder again") from None
        if manifest.format_version > FORMAT_VERSION:
            raise StorageError(
                f"has format version {manifest.format_version}; this version reads up to {FORMAT_VERSION}",
                where=where,
                fix="upgrade tigerbot, or use the version that wrote it",
            )
        for file in manifest.files:
            safe_key(file.path)
        return manifest


class Store(ABC):
    """Files under one address. Keys are relative paths with forward slashes; a prefix names whole path parts, so
    `run/step-1` never means `run/step-10`. Every method raises `StorageError`, one line with its fix.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def put_file(self, local: str | Path, key: str) -> None:
        """Store a file; readers see the old one or the new one."""

    @abstractmethod
    def get_file(self, key: str, local: str | Path) -> None:
        """Fetch a file; `local` appears by rename. Raises: MissingError."""

    def local(self, key: str) -> Path | None:
        """Where a file lies on this machine's own disk, to be read in place; None where it has to be fetched."""
        return None

    def copy(self, key: str, target: str) -> None:
        """Give a file a second key. Raises: MissingError."""
        with tempfile.TemporaryDirectory() as folder:
            self.get_file(key, Path(folder) / "copied")
            self.put_file(Path(folder) / "copied", target)

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def get_bytes(self, key: str) -> bytes:
        """Raises: MissingError."""

    @abstractmethod
    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file, fewer where it ends before. Raises: MissingError."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Files at or below a prefix, sorted by key; what is being staged is not shown."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether a file has exactly this key."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Remove what stands at or below a prefix, manifests first. Nothing there is no error."""

    @abstractmethod
    def commit_folder(self, local_folder: str | Path, key: str) -> Manifest:
        """Store a folder as one thing: it is there whole once this returns, and was not there before."""

    @abstractmethod
    def _sweep(self, prefix: str, newest: str) -> list[str]:
        """Remove what unfinished commits at or before the key `newest` left where listings do not show it."""

    def at(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def manifest(self, key: str) -> Manifest:
        """The manifest of a committed folder.

        Raises:
            MissingError: nothing was committed there.
        """
        try:
            data = self.get_bytes(f"{safe_key(key)}/{MANIFEST}")
        except MissingError:
            raise MissingError("nothing whole was committed here", where=self.at(key), fix="list the store") from None
        return Manifest.from_bytes(data, where=self.at(key))

    def fetch_folder(self, key: str, local_folder: str | Path) -> Manifest:
        """Fetch a committed folder to a place that is empty, or that holds it already; every file is verified.

        Raises:
            MissingError: nothing was committed there.
            CorruptError: a file differs from its manifest; the line names it.
        """
        target = Path(local_folder)
        for _ in range(3):
            manifest = self.manifest(key)
            try:
                if _holds(target, manifest):
                    return manifest
                self._fetch(key, manifest, target)
                return manifest
            except CorruptError:
                # Committed again while we read: begin again with what is there now.
                if self.manifest(key) == manifest:
                    raise
        raise StorageError("changes faster than it can be read", where=self.at(key), fix="let one process write a key")

    def _fetch(self, key: str, manifest: Manifest, target: Path) -> None:
        with disk_errors(target), staged(target) as stage:
            stage.mkdir()
            for file in manifest.files:
                local = stage / file.path
                local.parent.mkdir(parents=True, exist_ok=True)
                self._get_verified(f"{key}/{file.path}", local, file)
            (stage / MANIFEST).write_bytes(manifest.to_bytes())
            fsync_folder(stage)
            publish(stage, target)

    def _get_verified(self, key: str, local: Path, file: ManifestFile) -> None:
        fix = "use an older checkpoint, or commit it again"
        try:
            self.get_file(key, local)
        except MissingError:
            raise CorruptError("is in the manifest but missing", where=self.at(key), fix=fix) from None
        if local.stat().st_size != file.size_bytes or sha256_file(local) != file.sha256:
            raise CorruptError("differs from its manifest", where=self.at(key), fix=fix)

    def committed(self, prefix: str = "") -> list[str]:
        """Keys at or below a prefix that hold a complete committed folder, sorted."""
        return _complete(self, self.list(prefix))

    def set_aside(self, key: str) -> None:
        """Mark a committed folder as damaged: it counts as committed no more, and is not cleaned away."""
        self.put_bytes(f"{key}/{DAMAGED}", self.get_bytes(f"{safe_key(key)}/{MANIFEST}"))
        self.delete(f"{key}/{MANIFEST}")

    def retain(self, prefix: str, keep: int) -> list[str]:
        """Keep the last `keep` committed folders below a prefix, in order of key; returns the keys removed.

        What an unfinished commit left is removed too where a later key is complete.
        """
        if keep < 1:
            raise InputError(f"got keep={keep}, wants at least 1", where=self.at(prefix), fix="keep one")
        entries = self.list(prefix)
        complete = _complete(self, entries)
        if not complete:
            return []
        depth = len(PurePosixPath(prefix).parts) + 1
        children = {"/".join(PurePosixPath(entry.key).parts[:depth]) for entry in entries}
        whole = {"/".join(PurePosixPath(key).parts[:depth]) for key in complete}
        damaged = {str(PurePosixPath(entry.key).parent) for entry in entries if entry.key.endswith(f"/{DAMAGED}")}
        unfinished = children - whole - damaged
        incomplete = [child for child in unfinished if child < complete[-1] and self._is_folder(child, entries)]
        removed = sorted([*complete[:-keep], *incomplete])
        for key in removed:
            self.delete(key)
        return sorted({*removed, *self._sweep(prefix, complete[-1])})

    @staticmethod
    def _is_folder(child: str, entries: list[Entry]) -> bool:
        return all(entry.key != child for entry in entries)


def open_store(uri: str) -> Store:
    """The store at a folder path, `file://` or `s3://bucket/prefix` (endpoint from AWS_ENDPOINT_URL).

    Raises:
        InputError: no such kind of address.
    """
    if uri.startswith("s3://"):
        from tigerbot.objects import ObjectStore

        return ObjectStore(uri)
    scheme, separator, path = uri.partition("://")
    if separator and scheme != "file":
        raise InputError(f"got {scheme}://, wants a folder, file:// or s3://", where=uri, fix="correct storage.uri")
    from tigerbot.folders import FolderStore

    return FolderStore(path if separator else uri)


def safe_key(key: str) -> str:
    """The key, if it stays below the store.

    Raises:
        InputError: it is empty, absolute, climbs out, or is a name this module keeps for itself.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") or part.startswith(STAGED) or "\0" in part for part in parts):
        raise InputError(f"got key {key!r}, wants a relative path", where="storage", fix="use names joined by /")
    return key


def files_below(folder: Path) -> list[str]:
    """Relative paths of the files of a folder, sorted, without a manifest from where it came.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("is not a folder", where=str(folder), fix="give the folder to commit")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    mine = (path for path in found if not any(part.startswith(STAGED) for part in path.parts))
    return sorted(path.as_posix() for path in mine if path.as_posix() != MANIFEST)


def _complete(store: Store, entries: list[Entry]) -> list[str]:
    sizes = {entry.key: entry.size_bytes for entry in entries}
    complete = []
    for key in (entry.key for entry in entries if entry.key.endswith(f"/{MANIFEST}")):
        folder = key.removesuffix(f"/{MANIFEST}")
        try:
            files = store.manifest(folder).files
        except (CorruptError, MissingError):
            continue  # not ours, or deleted since the listing
        if all(sizes.get(f"{folder}/{file.path}") == file.size_bytes for file in files):
            complete.append(folder)
    return sorted(complete)


def _holds(folder: Path, manifest: Manifest) -> bool:
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != manifest.to_bytes():
        return False
    local = ((folder / file.path, file) for file in manifest.files)
    return all(path.is_file() and sha256_file(path) == file.sha256 for path, file in local)
