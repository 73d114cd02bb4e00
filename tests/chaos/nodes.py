"""Real Ray clusters on this machine that can be broken: every node's processes are real, so is every death.

Without a network all nodes share this machine's loopback, processes and /dev/shm. With one (root), each node is a
machine of its own: network, process ids, host name and /dev/shm, which are gone with it. Files are shared by both.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil
from network import Network

HERE = Path(__file__).parent
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class HealthCheck:
    """How the head finds out that a node is gone without a word: `failures` checks in a row that got no answer.

    Ray's own values (3 s, 10 s, 5) need about a minute; these need 1-2 s.
    """

    period_ms: int = 300
    timeout_ms: int = 500
    failures: int = 3
    initial_delay_ms: int = 1000

    def system_config(self) -> dict[str, int]:
        return {
            "health_check_period_ms": self.period_ms,
            "health_check_timeout_ms": self.timeout_ms,
            "health_check_failure_threshold": self.failures,
            "health_check_initial_delay_ms": self.initial_delay_ms,
        }


@dataclass
class Node:
    """A node; `holder` is the process whose end is the end of all others on it."""

    name: str
    address: str
    holder: subprocess.Popen[str]
    log: Path

    def processes(self) -> list[psutil.Process]:
        """All of its processes, the holders left out."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.holder.pid).children(recursive=True)
            return [process for process in found if "leash.py" not in " ".join(_words(process))]
        return []


@dataclass
class Driver:
    """A program that uses the cluster; its output, both streams, is in `log`."""

    popen: subprocess.Popen[bytes]
    log: Path
    # A program in a node's namespaces is the child of the command that entered them.
    entered: bool = False

    def process(self) -> psutil.Process:
        entrance = psutil.Process(self.popen.pid)
        until = time.monotonic() + 10
        while self.entered and entrance.is_running() and time.monotonic() < until:
            if children := entrance.children():
                return children[0]
            time.sleep(0.01)
        return entrance

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process().send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status.

        Raises:
            AssertionError: it still runs; the message ends with what it said last.
        """
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver still runs after {timeout_s} s: {self.output()[-3000:]}") from None


@dataclass
class RayCluster:
    """A head named "head" and workers "node1", "node2", ... with a token of their own; a context manager.

    Every node has a custom resource with its own name, so that a task can be sent to it.

    Args:
        workers: nodes besides the head.
        cpus, head_cpus: logical CPUs of a worker node and of the head.
        network: gives every node an address and namespaces of its own; closed by whoever made it.
        memory_mb: /dev/shm of a node that is a machine of its own.
        dashboard: at `dashboard_url`; needed for `ray job submit`.
        environment_of_nodes: what every process on every node finds in its environment besides.
    """

    workers: int = 1
    cpus: int = 2
    head_cpus: int = 1
    health_check: HealthCheck = field(default_factory=HealthCheck)
    network: Network | None = None
    memory_mb: int = 1024
    dashboard: bool = False
    system_config: Mapping[str, object] = field(default_factory=dict)
    environment_of_nodes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.scratch = Path(tempfile.mkdtemp(prefix="tc", dir="/tmp"))  # Ray's sockets need a short path
        (self.scratch / "token").write_text(secrets.token_hex(16))
        self._drivers: list[Driver] = []
        self._watch: _Watch | None = None
        self._count = 0
        self._dashboard_port = 0

    def __enter__(self) -> RayCluster:
        try:
            self._start_head()
            for name in [self._begin_node() for _ in range(self.workers)]:
                self._wait_ready(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self._watch:
            self._watch.close()
        for driver in self._drivers:
            with suppress(psutil.NoSuchProcess):
                _kill_family(driver.popen.pid)
            driver.popen.wait(10)
        for node in self.nodes.values():
            _let_go(node)
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{self.nodes['head'].address}:{self._port}"

    @property
    def dashboard_url(self) -> str:
        """Reachable from the head's network only, where there is one."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    def environment(self) -> dict[str, str]:
        """For a driver of this cluster, without anything that this process knows of another Ray."""
        return self._bare_environment() | {"RAY_ADDRESS": self.address}

    def command(self, node: str) -> list[str]:
        """What to put before a command so that it runs as a process of that node; nothing where nodes share all."""
        if self.network is None:
            return []
        inside = psutil.Process(self.nodes[node].holder.pid).children()[0].pid
        return ["nsenter", f"--target={inside}", "--net", "--pid", "--mount", "--uts", "--ipc", "--"]

    def run_driver(
        self,
        argv: Sequence[str],
        *,
        node: str = "head",
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Driver:
        """Start a program that connects to the cluster, on a node's network if it has one. It ends with the cluster."""
        log = self.scratch / f"driver-{len(self._drivers)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [*self.command(node), *argv],
                cwd=cwd,
                env=self.environment() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        driver = Driver(popen, log, entered=self.network is not None)
        self._drivers.append(driver)
        return driver

    def add_node(self, name: str = "", *, cpus: int | None = None) -> Node:
        """Start a node and wait until it is ready; a name that was there before is a machine that comes back."""
        name = self._begin_node(name, cpus=cpus)
        self._wait_ready(name)
        return self.nodes[name]

    def kill_node(self, name: str, *, everything: bool = True) -> None:
        """SIGKILL all of a node's processes, as a power cut does, or its raylet alone."""
        node = self.nodes[name]
        if everything:
            _let_go(node)
            return
        for raylet in self.processes(r"raylet/raylet\b", node=name):
            raylet.kill()

    def processes(self, pattern: str = "", *, node: str | None = None) -> list[psutil.Process]:
        """Processes of the cluster's nodes whose command line matches; host process ids."""
        nodes = [self.nodes[node]] if node else self.nodes.values()
        return [
            process for one in nodes for process in one.processes() if re.search(pattern, " ".join(_words(process)))
        ]

    def workers_named(self, pattern: str, *, node: str | None = None) -> list[psutil.Process]:
        """Ray's worker processes by title: `ray::RayTrainWorker`, `ray::Keeper`, `ray::IDLE` ..."""
        return self.processes(rf"^ray::(?:{pattern})", node=node)

    def alive(self) -> set[str]:
        """Names of the nodes that the head takes for alive."""
        return self._watching().alive

    def wait_alive(self, names: set[str], timeout_s: float) -> float:
        """Seconds until the head takes just these nodes for alive."""
        watch, began = self._watching(), time.monotonic()
        while watch.alive != names:
            if time.monotonic() - began > timeout_s:
                raise AssertionError(f"alive after {timeout_s} s: {sorted(watch.alive)}, wanted: {sorted(names)}")
            time.sleep(0.02)
        return time.monotonic() - began

    def _watching(self) -> _Watch:
        if self._watch is None:
            self._watch = _Watch([*self.command("head"), sys.executable, str(HERE / "watch.py")], self.environment())
        return self._watch

    def _bare_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIGER_"))}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.scratch / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def _start_head(self) -> None:
        self._port, self._dashboard_port, client = _free_ports(3)
        config = json.dumps({**self.health_check.system_config(), **self.system_config})
        words = ["--head", "--port", str(self._port), "--ray-client-server-port", str(client)]
        words += ["--include-dashboard", str(self.dashboard).lower(), "--system-config", config]
        words += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self._dashboard_port)]
        self._begin("head", words, self.head_cpus)
        self._wait_ready("head")

    def _begin_node(self, name: str = "", *, cpus: int | None = None) -> str:
        if not name:
            self._count += 1
            name = f"node{self._count}"
        # A log monitor costs more to start than the raylet; only what runs on the head is heard by the driver.
        words = ["--address", self.address, "--include-log-monitor", "false"]
        self._begin(name, words, self.cpus if cpus is None else cpus)
        return name

    def _begin(self, name: str, words: Sequence[str], cpus: int) -> None:
        agent, grpc, metrics, runtime = map(str, _free_ports(4))
        address = "127.0.0.1"
        prefix: list[str] = []
        leash = [sys.executable, "-I", "-S", str(HERE / "leash.py")]
        if self.network is not None:
            known = name in self.network
            address = self.network.address(name) if known else self.network.add(name)
            spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc"]
            prefix = [*self.network.command(name), *spaces, "--"]
            leash += ["--machine", name, "--memory-mb", str(self.memory_mb)]
        log = self.scratch / f"{name}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        command += ["--node-name", name, "--node-ip-address", address, "--num-cpus", str(cpus), "--num-gpus", "0"]
        command += ["--resources", json.dumps({name: 1000}), "--object-store-memory", "80000000"]
        command += ["--temp-dir", str(self.scratch / name), "--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc]
        command += ["--metrics-export-port", metrics, "--runtime-env-agent-port", runtime, "--disable-usage-stats"]
        holder = subprocess.Popen(
            [*prefix, *leash, str(log), *command],
            env=self._bare_environment() | {"TIGER_CHAOS_NODE": name} | dict(self.environment_of_nodes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.nodes[name] = Node(name, address, holder, log)

    def _wait_ready(self, name: str) -> None:
        node = self.nodes[name]
        said = _line_within(node.holder.stdout, START_TIMEOUT_S)
        if said != "exited 0":
            raise AssertionError(f"{name} did not start ({said or 'no answer'}): {node.log.read_text()[-3000:]}")


class _Watch:
    """A process on the head's network that says which nodes are alive whenever that changes."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.alive: set[str] = set()
        self._popen = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.alive = set(json.loads(line))

    def close(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(2)
        _kill_family(self._popen.pid)
        self._popen.wait(10)
        self._thread.join(10)


def _let_go(node: Node) -> None:
    assert node.holder.stdin is not None
    for process in node.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.holder.stdin.close()
    node.holder.wait(20)


def _kill_family(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def _line_within(stream: IO[str] | None, timeout_s: float) -> str:
    assert stream is not None
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(stream.readline().strip()), daemon=True)
    reader.start()
    reader.join(timeout_s)
    return found[0] if found else ""


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
