"""Prints the names of the nodes that a cluster's head takes for alive, as a JSON list, whenever they change.

It asks the head at RAY_ADDRESS ten times a second, and ends with its standard input.
"""

from __future__ import annotations

import json
import os
import select
from contextlib import suppress

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
