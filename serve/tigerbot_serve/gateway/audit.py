"""One JSON line for every request: who, what, how many tokens, how long. Never a body, a key or a user's name.

Lines are built where the request ends and written by a thread, which gathers them: no request waits for a disk. A thread
that cannot keep up drops lines and counts them. The file is rotated by size, so that the disk it may fill is bounded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from tigerbot.errors import first_line
from tigerbot.spec.access import AuditSpec
from tigerbot_serve.gateway.rotating import append, private
from tigerbot_serve.gateway.visit import Visit

log = logging.getLogger(__name__)

GATHER_S = 0.1
MAX_WAITING = 20_000


class Audit:
    """The audit log of one process, in a file of its own below `folder`.

    Args:
        folder: the run's; None where there is none: what should go into a file is not kept then.
    """

    def __init__(self, spec: AuditSpec, folder: Path | None) -> None:
        self._spec = spec
        self.path: Path | None = None
        if spec.to == "file" and folder is not None:
            self.path = folder / "audit" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self._wanted = spec.to == "stdout" or self.path is not None
        self.dropped = 0
        self._pepper = _pepper(folder)
        self._lines: deque[str] = deque()
        self._some, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def pseudonym(self, user: str) -> str:
        """The same 16 hex digits for the same user of this run, from which the name cannot be looked up."""
        return hashlib.blake2b(user.encode("utf-8", "surrogateescape"), key=self._pepper, digest_size=8).hexdigest()

    def write(self, visit: Visit) -> None:
        """Queue the visit's line."""
        if not self._wanted:
            return
        if len(self._lines) >= MAX_WAITING:
            self.dropped += 1
            return
        self._lines.append(line_of(visit))
        if self._thread is None:
            thread = threading.Thread(target=self._write_on, name="tiger-audit", daemon=True)
            thread.start()
            self._thread = thread  # now: whoever closes from another thread may wait for it
        if not self._some.is_set():
            self._some.set()

    def close(self) -> None:
        """Write what is queued."""
        self._stopping.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join(5)
        self._write()

    def _write_on(self) -> None:
        while not self._stopping.is_set():
            self._some.wait()
            self._stopping.wait(GATHER_S)
            self._some.clear()
            self._write()

    def _write(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if not lines:
            return
        text = "\n".join(lines) + "\n"
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            append(self.path, text, max_bytes=self._spec.max_bytes, keep=self._spec.keep)
        except OSError as error:
            self.dropped += len(lines)
            log.error("%s: %d audit lines are lost (%s)", self.path, len(lines), first_line(error))


def line_of(visit: Visit) -> str:
    """A visit as one line of JSON: escapes keep every line break out of it."""
    summary = visit.summaries[0] if visit.summaries else None
    first = visit.first_token
    return json.dumps(
        {
            "time": datetime.fromtimestamp(visit.epoch, UTC).isoformat(timespec="milliseconds"),
            "request_id": visit.request_id,
            "key": visit.key.id if visit.key else None,
            "user": visit.user or None,
            "route": visit.route,
            "status": visit.status,
            "code": visit.code or None,
            "prompt_tokens": visit.tokens.prompt,
            "completion_tokens": visit.tokens.completion,
            "draft_tokens": visit.tokens.draft,
            "judge_tokens": visit.tokens.judge,
            "dial": summary.dial if summary else None,
            "verdict": summary.verdict if summary else None,
            "first_token_ms": None if first is None else round(1000 * (first - visit.began), 2),
            "ms": round(1000 * (visit.ended - visit.began), 2),
        }
    )


def _pepper(folder: Path | None) -> bytes:
    """The run's secret for pseudonyms, the same in every replica and after a restart."""
    if folder is None:
        return secrets.token_bytes(32)
    path = folder / "audit" / "pepper"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".pepper.{os.getpid()}")
        with open(staged, "wb", opener=private) as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):  # whoever comes first; the others read it
            os.link(staged, path)
        staged.unlink()
        return path.read_bytes()
    except OSError as error:
        log.error("%s: pseudonyms change with this process (%s)", path, first_line(error))
        return secrets.token_bytes(32)
