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
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from network import Network
from processes import Driver, Leashed, Node, command_line, free_ports
from watch import Watch

START_TIMEOUT_S = 150.0


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
        self._watch: Watch | None = None
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
        # All of it, even where a part fails; in the reverse order of this list.
        with ExitStack() as ending:
            ending.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            for held in [*(node.held for node in self.nodes.values()), *self._drivers]:
                ending.callback(held.end)
            if self._watch:
                ending.callback(self._watch.close)

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
        inside = psutil.Process(self.nodes[node].held.holder.pid).children()[0].pid
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
        options = ["--cwd", str(cwd or Path.cwd())]
        driver = Driver(
            argv,
            log,
            self.environment() | dict(environment or {}),
            prefix=self.command(node),
            options=options,
        )
        self._drivers.append(driver)
        return driver

    def add_node(self, name: str = "", *, cpus: int | None = None) -> Node:
        """Start a node and wait until it is ready; a name that was there before is a machine that comes back."""
        name = self._begin_node(name, cpus=cpus)
        self._wait_ready(name)
        return self.nodes[name]

    def kill_node(self, name: str, *, everything: bool = True) -> None:
        """SIGKILL all of a node's processes, or its raylet alone.

        A machine of its own falls silent first, as in a power cut: no peer hears its sockets close.
        """
        if everything:
            if self.network is not None:
                self.network.cut(name)
            self.nodes[name].held.end()
            return
        for raylet in self.processes(r"raylet/raylet\b", node=name):
            raylet.kill()

    def processes(self, pattern: str = "", *, node: str | None = None) -> list[psutil.Process]:
        """Processes of the cluster's nodes whose command line matches; host process ids."""
        nodes = [self.nodes[node]] if node else self.nodes.values()
        return [
            process for one in nodes for process in one.held.processes() if re.search(pattern, command_line(process))
        ]

    def workers_named(self, pattern: str, *, node: str | None = None) -> list[psutil.Process]:
        """Ray's worker processes by title: `ray::RayTrainWorker`, `ray::Keeper`, `ray::IDLE` ..."""
        return self.processes(rf"^ray::(?:{pattern})", node=node)

    def alive(self) -> set[str]:
        """Names of the nodes that the head takes for alive."""
        return self._watching().alive

    def wait_alive(self, names: set[str], timeout_s: float) -> float:
        """Seconds until the head takes just these nodes for alive."""
        return self._watching().wait(names, timeout_s)

    def _watching(self) -> Watch:
        if self._watch is None:
            self._watch = Watch(self.command("head"), self.environment())
        return self._watch

    def _bare_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIGER_"))}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.scratch / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",  # a machine with other things to do
            "TOKENIZERS_PARALLELISM": "false",
        }

    def _start_head(self) -> None:
        self._port, self._dashboard_port, client = free_ports(3)
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
        agent, grpc, metrics, runtime = map(str, free_ports(4))
        address = "127.0.0.1"
        prefix: list[str] = []
        options: list[str] = []
        if self.network is not None:
            if name in self.network:
                self.network.heal(name)
            else:
                self.network.add(name)
            address = self.network.address(name)
            spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc"]
            prefix = [*self.network.command(name), *spaces, "--"]
            options = ["--machine", name, "--memory-mb", str(self.memory_mb)]
        log = self.scratch / f"{name}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        command += ["--node-name", name, "--node-ip-address", address, "--num-cpus", str(cpus), "--num-gpus", "0"]
        command += ["--resources", json.dumps({name: 1000}), "--object-store-memory", "80000000"]
        command += ["--temp-dir", str(self.scratch / name), "--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc]
        command += ["--metrics-export-port", metrics, "--runtime-env-agent-port", runtime, "--disable-usage-stats"]
        environment = self._bare_environment() | {"TIGER_CHAOS_NODE": name} | dict(self.environment_of_nodes)
        held = Leashed(command, log, environment, prefix=prefix, options=options)
        self.nodes[name] = Node(name, address, held)

    def _wait_ready(self, name: str) -> None:
        held = self.nodes[name].held
        if held.wait(START_TIMEOUT_S):
            raise AssertionError(f"{name} did not start: {held.output()[-3000:]}")
