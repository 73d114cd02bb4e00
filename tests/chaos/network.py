"""A network of our own to break: every node in a namespace of its own, joined by a router in another one.

Node i has the address 10.77.i.2, the router 10.77.i.1. Namespaces are held by file descriptors of this process and by
nothing else, so that the kernel takes them, their links and their rules away when this process ends in whatever way.
The host's own interfaces, routes and rules are never touched.

A cut is silence (packets are dropped, links stay up), as a broken switch makes it: no reset, no error, only waiting.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import pytest

Direction = Literal["in", "out", "both"]
Command = Sequence[str]
Result = TypeVar("Result")


def needs_network() -> None:
    """Skip the test where this machine has no namespaces for us."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (iproute2, util-linux)")
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("this kernel or container forbids new namespaces")


class Network:
    """Nodes by name. `cut`, `heal`, `rate` and `latency` act on the link between one node and all others."""

    def __init__(self) -> None:
        self._router = _namespace()
        self._nodes: dict[str, int] = {}
        self._index: dict[str, int] = {}
        self._delayers: dict[str, subprocess.Popen[str]] = {}
        self._in_router("ip", "link", "set", "lo", "up")
        self._in_router("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self._delayers):
            self.latency(name, 0)
        for held in [self._router, *self._nodes.values()]:
            os.close(held)
        self._nodes.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def add(self, name: str) -> str:
        """Join a node; its address."""
        index = self._index[name] = len(self._index) + 1
        inside = self._nodes[name] = _namespace()
        here = f"p{index}"
        self._in_router("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", _path(inside))
        self._in_router("ip", "address", "add", f"10.77.{index}.1/24", "dev", here)
        self._in_router("ip", "link", "set", here, "up")
        for words in (
            "link set lo up",
            f"address add {self.address(name)}/24 dev eth0",
            "link set eth0 up",
            f"route add default via 10.77.{index}.1",
        ):
            _run([*self.command(name), "ip", *words.split()])
        return self.address(name)

    def address(self, name: str) -> str:
        return f"10.77.{self._index[name]}.2"

    def command(self, name: str) -> list[str]:
        """What to put before a command so that it runs on that node's network."""
        return ["nsenter", f"--net={_path(self._nodes[name])}", "--"]

    def inside(self, name: str, call: Callable[[], Result]) -> Result:
        """Call something on that node's network: sockets it makes, and threads it starts, stay there."""

        def enter() -> Result:
            if ctypes.CDLL(None, use_errno=True).setns(self._nodes[name], 0):
                raise OSError(ctypes.get_errno(), "setns")
            return call()

        # A namespace is a thread's: this one ends here and takes no other with it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()

    def cut(self, name: str, direction: Direction = "both") -> None:
        """Drop what comes to the node ("in"), what it sends ("out"), or both."""
        self.heal(name)
        for rule in self._rules(name, direction):
            self._in_router("ip", "rule", "add", "priority", "10", *rule, "blackhole")

    def heal(self, name: str) -> None:
        for rule in self._rules(name, "both"):
            subprocess.run(
                [*self._router_command(), "ip", "rule", "del", "priority", "10", *rule, "blackhole"],
                capture_output=True,
                check=False,  # there was no cut in this direction
            )

    def rate(self, name: str, mbit: float | None) -> None:
        """Limit the node's link in each direction; None takes the limit away."""
        ends = ((self._router_command(), f"p{self._index[name]}"), (self.command(name), "eth0"))
        for prefix, device in ends:
            subprocess.run([*prefix, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            if mbit is not None:
                # A bucket of 10 ms, and room for 100 ms of packets to wait in.
                burst = max(int(mbit * 1e6 / 8 * 0.010), 70_000)
                shape = f"tbf rate {mbit}mbit burst {burst} latency 100ms"
                _run([*prefix, "tc", "qdisc", "add", "dev", device, "root", *shape.split()])

    def latency(self, name: str, seconds: float, loss: float = 0.0) -> None:
        """Let every packet that the node sends wait, and lose a share of them; 0 takes both away.

        The kernel here has no netem: a process of ours takes the packets from a tun device and puts them back later.
        """
        if name in self._delayers:
            delayer = self._delayers.pop(name)
            delayer.kill()
            delayer.wait()
            self._in_router("ip", "rule", "del", "priority", "20", "iif", f"p{self._index[name]}")
        if not seconds and not loss:
            return
        index = self._index[name]
        script = str(Path(__file__).with_name("delayer.py"))
        command = [*self._router_command(), sys.executable, "-I", "-S", script, f"t{index}", str(seconds), str(loss)]
        delayer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._delayers[name] = delayer
        assert delayer.stdout is not None
        if delayer.stdout.readline() != "ready\n":
            raise RuntimeError(f"no tun device for {name}")
        table = str(100 + index)
        self._in_router("ip", "link", "set", f"t{index}", "up")
        self._in_router("ip", "route", "replace", "default", "dev", f"t{index}", "table", table)
        self._in_router("ip", "rule", "add", "priority", "20", "iif", f"p{index}", "lookup", table)

    def _rules(self, name: str, direction: Direction) -> list[list[str]]:
        index = self._index[name]
        incoming = ["to", f"10.77.{index}.0/24"]
        outgoing = ["iif", f"p{index}"]
        return {"in": [incoming], "out": [outgoing], "both": [incoming, outgoing]}[direction]

    def _router_command(self) -> list[str]:
        return ["nsenter", f"--net={_path(self._router)}", "--"]

    def _in_router(self, *words: str) -> None:
        _run([*self._router_command(), *words])


def _namespace() -> int:
    """A descriptor of a new network namespace, which lives as long as the descriptor or a process in it."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdin is not None and made.stdout is not None
        made.stdin.write(b".")
        made.stdin.flush()
        made.stdout.read(1)  # it answers: the namespace is there
        return os.open(f"/proc/{made.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _run(command: Command) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
