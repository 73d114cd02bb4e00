"""A network of our own, shown to break: silence one way or both, a slow link, a late one, and a Ray cluster across it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from network import Network
from nodes import RayCluster
from s3 import s3_server

pytestmark = pytest.mark.root

SERVER = """
import socket
listener = socket.create_server(("0.0.0.0", 9))
print("ready", flush=True)
while True:
    client, _ = listener.accept()
    while client.recv(1 << 20): pass
    client.close()
"""
# Seconds to connect, and until the other end has all bytes; -1 where there is no connection.
CLIENT = """
import socket, sys, time
began = time.monotonic()
try:
    end = socket.create_connection((sys.argv[1], 9), timeout=float(sys.argv[3]))
except OSError:
    print(-1, -1)
    raise SystemExit
connected = time.monotonic()
end.settimeout(20)
end.sendall(bytes(int(sys.argv[2])))
end.shutdown(socket.SHUT_WR)
end.recv(1)
print(connected - began, time.monotonic() - connected)
"""
WHERE = """
import os, pathlib, socket, sys, ray
ray.init()

@ray.remote(num_cpus=0.1)
def where():
    pathlib.Path("/dev/shm/mine").touch(exist_ok=False)
    return os.environ["TIGER_CHAOS_NODE"], socket.gethostname(), ray.util.get_node_ip_address()

print(*ray.get([where.options(resources={node: 1}).remote() for node in sys.argv[1:]]), sep="\\n")
"""


@pytest.fixture(scope="module")
def pair(network: Network) -> Iterator[Network]:
    """Nodes "left" and "right", a server on the right one."""
    network.add("left")
    network.add("right")
    command = [*network.command("right"), sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        server.stdout.readline()
        yield network
        server.kill()


def send(network: Network, size: int = 1, timeout_s: float = 5.0) -> tuple[float, float]:
    """Seconds to connect from left to right, and to send that many bytes."""
    words = [network.address("right"), str(size), str(timeout_s)]
    done = subprocess.run(
        [*network.command("left"), sys.executable, "-c", CLIENT, *words], capture_output=True, text=True, timeout=60
    )
    connect_s, send_s = map(float, done.stdout.split())
    return connect_s, send_s


def test_a_cut_is_silence_in_each_direction_and_heals(pair: Network) -> None:
    found = []
    for direction in ("in", "out", "both"):
        pair.cut("right", direction)
        found.append(send(pair, timeout_s=0.3))
        pair.heal("right")
        found.append(send(pair))

    assert [connect_s for connect_s, _ in found[::2]] == [-1, -1, -1]
    assert all(0 <= connect_s < 2 for connect_s, _ in found[1::2])


def test_a_link_is_slow_and_late_when_told(pair: Network) -> None:
    pair.rate("right", 20)
    _, slow = send(pair, 2_000_000)
    pair.rate("right", None)
    _, fast = send(pair, 2_000_000)
    pair.latency("right", 0.2)
    late, _ = send(pair)
    pair.latency("right", 0)
    soon, _ = send(pair)

    assert slow > 0.6 > fast and late >= 0.2 > soon


def test_a_bucket_is_a_node_of_the_network(pair: Network) -> None:
    with s3_server(pair) as s3:
        story = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status)"
        command = [*pair.command("left"), sys.executable, "-c", story, s3.environment()["AWS_ENDPOINT_URL"]]
        reached = subprocess.run(command, capture_output=True, text=True, timeout=30)
        s3.refuse(60)
        refused = subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert reached.stdout.strip() == "200" and "HTTP Error 500" in refused.stderr


def test_nothing_of_the_hosts_network_is_touched(pair: Network) -> None:
    rules = subprocess.run(["ip", "rule"], capture_output=True, text=True).stdout
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout

    assert "blackhole" not in rules and "veth" not in links


@pytest.fixture(scope="module")
def machines(network: Network) -> Iterator[RayCluster]:
    """A head and one worker node, each a machine of its own."""
    with RayCluster(workers=1, network=network) as started:
        yield started


def test_a_node_that_is_cut_off_is_dead_within_seconds_and_a_new_one_takes_its_place(
    network: Network, machines: RayCluster
) -> None:
    all_nodes = {"head", "node1"}
    machines.wait_alive(all_nodes, 20)
    asked = machines.run_driver([sys.executable, "-c", WHERE, *sorted(all_nodes)])
    status, said = asked.wait(60), asked.output().splitlines()[-2:]

    network.cut("node1")
    seconds_to_notice = machines.wait_alive({"head"}, 20)
    network.heal("node1")
    time.sleep(1)
    after_heal = machines.alive()
    machines.kill_node("node1")
    machines.add_node("node1")
    machines.wait_alive(all_nodes, 20)
    again = machines.run_driver([sys.executable, "-c", WHERE, "node1"])

    places = [(name, machines.nodes[name].address) for name in sorted(all_nodes)]
    assert status == 0 and said == [str((name, name, address)) for name, address in places]
    assert 0.5 < seconds_to_notice < 6 and after_heal == {"head"}
    assert again.wait(60) == 0, again.output()  # its /dev/shm is as empty as a new machine's
