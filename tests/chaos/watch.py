"""Which nodes a cluster's head takes for alive, now.

`Watch` runs this file as a process that can reach the head; it prints the names as a JSON list whenever they change:

    RAY_ADDRESS=... python watch.py      asks ten times a second, ends with its standard input
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil


class Watch:
    """`alive` is kept up to date until `close()`.

    Args:
        prefix: put before the command, so that it runs where the head can be reached.
        environment: the cluster's address and token.
    """

    def __init__(self, prefix: Sequence[str], environment: Mapping[str, str]) -> None:
        self.alive: set[str] = set()
        command = [*prefix, sys.executable, __file__]
        self._popen = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, names: set[str], timeout_s: float) -> float:
        """Seconds until just these nodes are alive."""
        began = time.monotonic()
        while self.alive != names:
            if time.monotonic() - began > timeout_s:
                raise AssertionError(f"alive after {timeout_s} s: {sorted(self.alive)}, wanted: {sorted(names)}")
            time.sleep(0.02)
        return time.monotonic() - began

    def close(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            # It may be the child of the command that entered the head's namespaces.
            for process in [*psutil.Process(self._popen.pid).children(), self._popen]:
                process.kill()
            self._popen.wait(10)
        self._thread.join(10)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.alive = set(json.loads(line))


def main() -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client = GcsClient(address=os.environ["RAY_ADDRESS"])
    before: list[str] | None = None
    while not select.select([0], [], [], 0.1)[0]:
        with suppress(Exception):  # the head may be what a story breaks
            nodes = client.get_all_node_info(timeout=5).values()
            now = sorted(node.node_name for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE)
            if now != before:
                print(json.dumps(now), flush=True)
                before = now


if __name__ == "__main__":
    main()
