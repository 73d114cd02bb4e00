"""What heavy trials can be gone on with from: the checkpoints of their runs, in the storage of the trials.

A takeover is staged as a copy of the source's newest checkpoint under `taken/<trial>`. The trial, when it begins again,
makes it the first checkpoint of a new run: same shards, but the header bears the hash of what it now computes, so no
identity check has to look away. A trial that needs less memory goes on from its own checkpoint in the same way.
"""

from __future__ import annotations

import json
from dataclasses import replace

from tigerbot.errors import StorageError
from tigerbot.runs import Run, open_run, read_json, write_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import MANIFEST, MissingError, Store, open_store
from tigerbot_jobs.train.checkpoint import HEADER, Header, checkpoint_key, commit

_TAKEN = "taken.json"
_TRIES = 5


class Checkpoints:
    """Args:
    uri: of the trials' storage. A trial's run has its name.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    # As `States` has them, for the driver.

    def read(self, name: str) -> bytes | None:
        """Nothing is handed to a trial: it finds its checkpoints itself."""
        return None

    def write(self, name: str, state: bytes) -> None:
        raise NotImplementedError("a heavy trial keeps its state itself")

    def stage(self, source: str, name: str) -> bool:
        """Copy a member's newest checkpoint to be taken over; what was staged before is gone.

        Raises:
            StorageError: it has none.
        """
        store = self._store
        for _ in range(_TRIES):
            newest = self._newest(source)
            if newest is None:
                break
            try:
                store.delete(_staged(name))
                _copy(store, newest, f"{_staged(name)}/{newest.rsplit('/', 1)[1]}")
            except MissingError:
                continue  # the source has a newer one by now, and this one went
            return True
        raise StorageError(f"{source} has no whole checkpoint", where=self._uri, fix="the same command goes on")

    def take(self, name: str) -> None:
        """The trial does it, when it begins again: until then its old life may be writing."""

    def forget(self, name: str) -> None:
        """A run's checkpoints stay with it."""

    # For the trial.

    def opened(self, spec: TrainSpec, *, keep: bool) -> Run | None:
        """The trial's run, begun anew from what was staged; None where nothing was.

        Args:
            keep: stage its own newest checkpoint first: the run goes on as another.
        """
        store, key = self._store, f"{spec.name}/checkpoints"
        staged = store.committed(_staged(spec.name))
        if not staged and keep and self._newest(spec.name) is not None:
            self.stage(spec.name, spec.name)
            staged = store.committed(_staged(spec.name))
        if not staged:
            return None
        store.delete(key)  # the run that was may go on no more
        run = open_run(spec, replace=True)
        step = _adopt(store, staged[-1], key, run.hash)
        write_json(run.folder / _TAKEN, {"step": step})
        store.delete(_staged(spec.name))
        return run

    def kept_step(self, name: str) -> int:
        """The step of a trial's newest checkpoint; -1 where it has none."""
        found = self._store.committed(f"{name}/checkpoints")
        return int(found[-1].rsplit("-", 1)[1]) if found else -1

    @property
    def _store(self) -> Store:
        return open_store(self._uri)

    def _newest(self, name: str) -> str | None:
        """What it has taken over and not begun with yet, else its run's."""
        store = self._store
        found = store.committed(_staged(name)) or store.committed(f"{name}/checkpoints")
        return found[-1] if found else None


def taken_step(run: Run) -> int:
    """The step of the checkpoint that a run took over at its beginning; -1 where it took none."""
    return read_json(run.folder / _TAKEN, {"step": -1})["step"]


def _staged(name: str) -> str:
    return f"taken/{name}"


def _copy(store: Store, key: str, target: str) -> None:
    """Copy a committed folder; as ever its manifest comes last."""
    manifest = store.manifest(key)
    for file in manifest.files:
        store.copy(f"{key}/{file.path}", f"{target}/{file.path}")
    store.put_bytes(f"{target}/{MANIFEST}", manifest.to_bytes())


def _adopt(store: Store, staged: str, prefix: str, hash: str) -> int:
    """Make a staged checkpoint one of a run that has this hash; its step."""
    header = replace(Header(**json.loads(store.get_bytes(f"{staged}/{HEADER}"))), spec_hash=hash, data_hash="")
    key = checkpoint_key(prefix, header.step)
    files = [file for file in store.manifest(staged).files if file.path != HEADER]
    for file in files:
        store.copy(f"{staged}/{file.path}", f"{key}/{file.path}")
    commit(store, key, header, files)
    return header.step
