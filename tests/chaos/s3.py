"""An S3 server (moto, a process of its own) behind a relay that can make it fail.

The relay is `tests/platform/fault_proxy.py`: it answers with errors or breaks off in the middle of an upload, while the
server behind it stays as it is, so that a test can see what was really kept.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

sys.path.append(str(Path(__file__).parents[1] / "platform"))
from fault_proxy import Fault, FaultProxy

BUCKET = "runs"
ALWAYS = 10**9


class S3:
    """`uri` under `environment()` goes through the relay; `direct()` is the way past it."""

    uri = f"s3://{BUCKET}/team"

    def __init__(self, port: int) -> None:
        self._port = port
        self.relay = FaultProxy(port)
        self._timers: list[threading.Timer] = []

    def environment(self) -> dict[str, str]:
        return self._settings(self.relay.url)

    def direct(self) -> dict[str, str]:
        return self._settings(f"http://127.0.0.1:{self._port}")

    def refuse(self, seconds: float) -> None:
        """Answer everything with status 500 for that long, from now on."""
        self.relay.hurt(Fault("status_500", times=ALWAYS))
        timer = threading.Timer(seconds, self.relay.heal)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def cut_uploads(self, count: int = 1, after_bytes: int = 4096) -> None:
        """Break off the next uploads, each after that many bytes."""
        self.relay.hurt(Fault("kill_upload", method="PUT", times=count, after_bytes=after_bytes))

    def heal(self) -> None:
        self.relay.heal()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self.relay.close()

    def _settings(self, url: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket, until the block ends or this process does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    leash = [sys.executable, "-I", "-S", str(Path(__file__).with_name("leash.py")), os.devnull]
    command = [*leash, sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        _make_bucket(f"http://127.0.0.1:{port}/{BUCKET}")
        s3 = S3(port)
        try:
            yield s3
        finally:
            s3.close()
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(20)


def _make_bucket(url: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.put(url, timeout=2).is_success:
                return
        time.sleep(0.1)
    raise AssertionError("the S3 server did not start")
