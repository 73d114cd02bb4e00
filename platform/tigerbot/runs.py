"""A run on disk: its folder, its identity, its state. Name = run.

`open_run` decides what submitting a spec means: the first time it begins, the same spec again resumes (or shows that
it is done), another spec under the same name is refused with the difference. One process works on a run at a time,
held by a lock the kernel drops when the process dies. This module knows nothing about what a run computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tigerbot.errors import IdentityError, UnusableStorageError
from tigerbot.spec import Job, Spec, spec_changes, spec_difference, spec_hash
from tigerbot.staging import is_full

EXTENDABLE = (  # of which a run may be told to do more
    "train.tokens",
    "trials",
    "budget.hours",
    "budget.card_hours",
    "budget.money",
)


@dataclass
class Run:
    """An opened run. `folder` holds `spec.json`, `state.json` and whatever the job writes.

    Attributes:
        spec: the typed spec.
        hash: 16 hex digits of what it computes; of an extended run, of what it began as: its checkpoints bear it.
        folder: `<storage.uri>/<name>`, a local folder (for s3:// storage: the local staging folder).
        identity: 16 hex digits of the spec as it is now.
    """

    spec: Spec
    hash: str
    folder: Path
    identity: str = ""
    _lock: Any = field(default=None, repr=False)

    @property
    def state(self) -> dict[str, Any]:
        """`{"status": "running"|"done"|"failed", "result": {...}}`; `{"status": "new"}` before the first write."""
        return read_json(self.folder / "state.json", {"status": "new"})

    @property
    def done(self) -> bool:
        return self.state["status"] == "done"

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record the result and mark the run done; returns the result."""
        write_json(
            self.folder / "state.json",
            {"status": "done", "hash": self.identity, "ended": time.time(), "result": result},
        )
        return result

    def fail(self, message: str) -> None:
        """Record why it failed; where even that has no room, the run is as one that was killed."""
        about = {"status": "failed", "hash": self.identity, "ended": time.time(), "error": message}
        with contextlib.suppress(OSError):
            write_json(self.folder / "state.json", about)

    def become(self, spec: Spec) -> None:
        """Be a run of this spec from now on: an endpoint that was updated."""
        self.spec = spec
        self.hash = self.identity = spec_hash(spec)
        write_json(self.folder / "spec.json", {"hash": self.hash, "spec": spec.model_dump(mode="json")})
        state = self.state | {"hash": self.hash}
        write_json(self.folder / "state.json", state)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def local_root(spec: Job) -> Path:
    """The local folder a job works in: its storage folder, or the staging folder of an s3:// one."""
    uri = spec.storage.uri
    if uri.startswith("s3://"):
        return Path("./tiger-runs/.staging") / uri.removeprefix("s3://")
    return Path(uri.removeprefix("file://"))


def open_run(spec: Spec, *, replace: bool = False, extend: bool = False) -> Run:
    """Open the run named by a spec, to begin or to resume it.

    Raises:
        IdentityError: the name was used with another spec and neither `replace` nor `extend` covers that, or another
            process holds the run.
        UnusableStorageError: nothing can be written there.
    """
    folder = local_root(spec) / spec.name
    lock = _made_and_held(folder)
    identity, dumped = spec_hash(spec), spec.model_dump(mode="json")
    kept = read_json(folder / "spec.json", None)
    if spec.kind == "serve" and not replace:
        kept = None  # an endpoint has nothing to go on with: it is what its spec says today
    if kept is not None and kept["hash"] != identity and not replace:
        more = _wants_more(spec_changes(kept["spec"], dumped))
        if not (extend and more):
            lock.close()
            raise _refused(spec, folder, kept["spec"], dumped, more)
        write_json(folder / "state.json", {"status": "running", "hash": identity, "began": time.time()})
        kept = {"hash": identity, "began_as": kept.get("began_as", kept["hash"]), "spec": dumped}
        write_json(folder / "spec.json", kept)
    if kept is not None and replace:
        lock.close()
        folder.rename(folder.with_name(f"{folder.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
        folder.mkdir(parents=True)
        lock = hold_folder(folder)
        kept = None
    if kept is None:
        kept = {"hash": identity, "spec": dumped}
        write_json(folder / "spec.json", kept)
    run = Run(spec=spec, hash=kept.get("began_as", identity), folder=folder, identity=identity, _lock=lock)
    if not run.done or spec.kind == "serve":
        write_json(folder / "state.json", {"status": "running", "hash": identity, "began": time.time()})
    return run


def _wants_more(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether a spec differs only in how much it wants, and wants more."""
    return all(
        field in EXTENDABLE and old is not None and (new is None or new > old) for field, (old, new) in changes.items()
    )


def _refused(spec: Spec, folder: Path, old: dict[str, Any], new: dict[str, Any], more: bool) -> IdentityError:
    fix = "give it another name, or --replace to begin anew and keep the old"
    return IdentityError(
        f"run {spec.name} exists with another spec ({'; '.join(spec_difference(old, new)[:4])})",
        where=str(folder),
        fix=f"--extend to go on to that, {fix}" if more else fix,
    )


def holder(folder: Path) -> int | None:
    """The id of the living process that works on the run in this folder, if one does; 0 when it is not of this machine."""
    if not (folder / ".lock").exists():
        return None
    try:
        hold_folder(folder).close()
    except IdentityError:
        process, _, host = (folder / ".lock").read_text().partition(" ")
        return int(process) if process.isdigit() and host == socket.gethostname() else 0
    return None


def read_json(path: Path, default: Any) -> Any:
    """The JSON in a file, or the default where there is none or it was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return default


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _made_and_held(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold_folder(folder)
    except OSError as error:
        if is_full(error):
            raise
        what = f"cannot be written: {error.strerror}"
        fix = "correct storage.uri, or make it writable"
        raise UnusableStorageError(what, where=str(folder), fix=fix) from None


def hold_folder(folder: Path) -> Any:
    """An open lock file on a folder; the kernel drops it when this process dies.

    Raises:
        IdentityError: another process holds it.
    """
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        process, _, host = lock.read().partition(" ")
        lock.close()
        place = "" if host == socket.gethostname() else f" on {host}"
        raise IdentityError(
            "another process is working on this run" + (f" (process {process}{place})" if process else ""),
            where=str(folder),
            fix="wait for it, or stop it with `tiger stop`",
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()} {socket.gethostname()}")
    lock.flush()
    return lock
