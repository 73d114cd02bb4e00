"""Packets of one tun device, put back into it a while later, or never: latency and loss without netem.

    python delayer.py DEVICE SECONDS LOSS

Routing sends a node's packets out of the device; written back they come in from it and go on to their real target. It
ends with its standard input. Losses are drawn from a fixed seed.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def main() -> None:
    device, seconds, loss = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
    print("ready", flush=True)
    chance = random.Random(1)
    waiting: list[tuple[float, int, bytes]] = []
    count = 0
    while True:
        wait_s = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        ready, _, _ = select.select([tun, 0], [], [], wait_s)
        if 0 in ready and not os.read(0, 1):
            return
        if tun in ready:
            packet = os.read(tun, 65536)
            if chance.random() >= loss:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + seconds, count, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            with suppress(BlockingIOError):  # a full queue loses packets, as a real one does
                os.write(tun, heapq.heappop(waiting)[2])


if __name__ == "__main__":
    main()
