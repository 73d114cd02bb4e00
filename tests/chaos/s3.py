"""An S3 server (moto, a process of its own) behind a relay that can make it fail.

The relay is `tests/platform/fault_proxy.py`: it answers with errors or breaks off in the middle of an upload, while the
server behind it stays as it is, so that a test can see what was really kept.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from network import Network
from processes import Leashed, free_ports

sys.path.append(str(Path(__file__).parents[1] / "platform"))
from fault_proxy import Fault, FaultProxy

BUCKET = "runs"
NODE = "storage"
ALWAYS = 10**9


class S3:
    """`uri` under `environment()` goes through the relay; `direct()` is the way past it, on the server's own machine."""

    uri = f"s3://{BUCKET}/team"

    def __init__(self, port: int, relay: FaultProxy) -> None:
        self._port, self.relay = port, relay
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
def s3_server(network: Network | None = None) -> Iterator[S3]:
    """A server with an empty bucket, until the block ends or this process does.

    Args:
        network: where it becomes a node of its own, named "storage"; else it is on this machine's loopback.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if network is None:
        held = Leashed(command, Path(os.devnull), os.environ)
    else:
        network.add(NODE)
        held = Leashed(command, Path(os.devnull), os.environ, prefix=network.command(NODE))
    try:
        s3 = _relayed(port) if network is None else network.inside(NODE, lambda: _relayed(port, network.address(NODE)))
        try:
            yield s3
        finally:
            s3.close()
    finally:
        held.end()


def _relayed(port: int, host: str = "127.0.0.1") -> S3:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.put(f"http://127.0.0.1:{port}/{BUCKET}", timeout=2).is_success:
                return S3(port, FaultProxy(port, host))
        time.sleep(0.1)
    raise AssertionError("the S3 server did not start")
