"""What can go wrong, as one tree. Every error says what happened, where, and what to do.

    TigerError                 exit 1: the job failed
    ├── InputError             exit 2: the input was wrong, nothing was started
    │   ├── SpecError          a field of a spec
    │   ├── DataError          a data file, a token shard, a tokenizer
    │   └── IdentityError      a run of that name exists with another spec
    ├── StorageError           a folder or a bucket
    │   ├── UnusableStorageError   exit 2: it is not there, or not ours
    │   └── CorruptError       bytes differ from their checksum
    ├── StateError             a training state that is not whole, or not of this model
    ├── TrackingError          MLflow
    ├── ClusterError           Ray
    ├── ModelError             a checkpoint, an adapter, a head that does not fit
    └── ServeError             an endpoint

A bug is not in this tree: it stays a traceback.
"""

from __future__ import annotations


class TigerError(Exception):
    """A failure a user can act on.

    Args:
        what: what happened, one clause.
        where: file, field or address it happened at.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive the default pickling, and errors cross Ray processes.
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        """One line: `where: what; fix`."""
        line = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join(f"{line}; {self.fix}".split()) if self.fix else " ".join(line.split())


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says first, short enough for a line of ours."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if len(text) <= 200 else text[:197] + "..."


def _rebuild(kind: type[TigerError], what: str, where: str, fix: str) -> TigerError:
    return kind(what, where=where, fix=fix)


class InputError(TigerError):
    exit_code = 2


class SpecError(InputError):
    """A spec that does not validate: the file, the field, what it got, what it wants."""


class DataError(InputError):
    """A data file, token shard or tokenizer that cannot be used."""


class IdentityError(InputError):
    """A run with this name exists and was made from another spec."""


class StorageError(TigerError):
    """A folder or bucket that cannot be read or written."""


class UnusableStorageError(StorageError, InputError):
    """A folder or bucket that does not exist, or may not be used: waiting does not mend it."""


class CorruptError(StorageError):
    """Stored bytes that differ from the checksum in their manifest."""


class StateError(TigerError):
    """A training state that is not whole, or does not fit the model it is put into."""


class TrackingError(TigerError):
    """The tracking server refused or could not be reached."""


class ClusterError(TigerError):
    """Ray could not be started, reached or authenticated to."""


class ModelError(InputError):
    """A model, adapter, tokenizer or head that does not fit what it is used with."""


class ServeError(TigerError):
    """An endpoint that cannot be deployed or reached."""
