"""A store in a local or mounted folder: everything is built beside its place, made durable, and renamed into it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tigerbot.staging import STAGED, disk_errors, fsync, fsync_folder, publish, remove, staged, writer_of
from tigerbot.storage import MANIFEST, Entry, Manifest, ManifestFile, Store, files_below, safe_key

_COPY_BYTES = 4 * 1024 * 1024


class FolderStore(Store):
    """Files below a folder, which is made when something is first written."""

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser().resolve()
        super().__init__(str(self.root))

    def put_file(self, local: str | Path, key: str) -> None:
        target = self.root / safe_key(key)
        with disk_errors(target), staged(target) as stage:
            _copy(Path(local), stage)
            fsync(stage)
            publish(stage, target)

    def get_file(self, key: str, local: str | Path) -> None:
        target = Path(local)
        with disk_errors(target), staged(target) as stage:
            _copy(self.root / safe_key(key), stage)
            publish(stage, target)

    def local(self, key: str) -> Path | None:
        return self.root / safe_key(key)

    def copy(self, key: str, target: str) -> None:
        """A file here is replaced and never changed, so two names may share one, where the disk can do that."""
        source, named = self.root / safe_key(key), self.root / safe_key(target)
        with disk_errors(named), staged(named) as stage:
            try:
                os.link(source, stage)
            except FileNotFoundError:
                raise
            except OSError:
                _copy(source, stage)
                fsync(stage)
            publish(stage, named)

    def put_bytes(self, key: str, data: bytes) -> None:
        target = self.root / safe_key(key)
        with disk_errors(target), staged(target) as stage:
            stage.write_bytes(data)
            fsync(stage)
            publish(stage, target)

    def get_bytes(self, key: str) -> bytes:
        with disk_errors(self.at(key)):
            return (self.root / safe_key(key)).read_bytes()

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        path = self.root / safe_key(key)
        with disk_errors(self.at(key)), path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def list(self, prefix: str = "") -> list[Entry]:
        top = self.root / safe_key(prefix) if prefix else self.root
        if top.is_file():
            return [Entry(prefix, top.stat().st_size)]
        entries = []
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(STAGED)]
            for name in names:
                entry = None if name.startswith(STAGED) else self._entry(Path(folder) / name)
                entries += [entry] if entry else []
        return sorted(entries, key=lambda entry: entry.key)

    def exists(self, key: str) -> bool:
        return (self.root / safe_key(key)).is_file()

    def delete(self, prefix: str) -> None:
        target = self.root / safe_key(prefix)
        if not target.exists():
            return
        # Renamed away first: a deletion that is cut short leaves nothing that looks whole.
        with disk_errors(target), staged(target) as gone:
            publish(target, gone)

    def commit_folder(self, local_folder: str | Path, key: str) -> Manifest:
        source, target = Path(local_folder), self.root / safe_key(key)
        names = files_below(source)
        with disk_errors(target), staged(target) as stage:
            stage.mkdir()
            manifest = Manifest(files=tuple(_copied(source, stage, name) for name in names))
            if key in self.committed(key) and self.manifest(key) == manifest:
                return manifest
            (stage / MANIFEST).write_bytes(manifest.to_bytes())
            fsync_folder(stage)
            self.delete(key)  # an incomplete or earlier one of this key
            publish(stage, target)
        return manifest

    def _sweep(self, prefix: str, newest: str) -> list[str]:
        folder = self.root / prefix
        swept = []
        for left in folder.glob(f"{STAGED}*"):
            key = (Path(prefix) / left.name.removeprefix(STAGED).rsplit("@", 3)[0]).as_posix()
            writer = writer_of(left)
            # A folder staged on another machine is an older checkpoint's; a file may be anything, and in use.
            if key <= newest and (writer == "died" or (writer == "elsewhere" and left.is_dir())):
                remove(left)
                swept.append(key)
        return [key for key in swept if not (self.root / key).exists()]

    def _entry(self, path: Path) -> Entry | None:
        try:
            return Entry(path.relative_to(self.root).as_posix(), path.stat().st_size)
        except FileNotFoundError:
            return None  # removed by another process since it was listed


def _copied(source: Path, stage: Path, name: str) -> ManifestFile:
    target = stage / name
    target.parent.mkdir(parents=True, exist_ok=True)
    size_bytes, sha256 = _copy(source / name, target)
    return ManifestFile(path=name, size_bytes=size_bytes, sha256=sha256)


def _copy(source: Path, target: Path) -> tuple[int, str]:
    """Copy a file; its size and SHA-256 are those of the bytes written, even while the source is being changed."""
    digest, size_bytes = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_COPY_BYTES):
            writing.write(block)
            digest.update(block)
            size_bytes += len(block)
    return size_bytes, digest.hexdigest()
