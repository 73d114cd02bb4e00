"""A Ray cluster on this machine, shown to break: workers, raylets and whole nodes die, and are replaced."""

from __future__ import annotations

import sys
import time

import psutil
from nodes import RayCluster

# An actor on each node named, until somebody kills the driver.
STAY = """
import sys, time, ray
ray.init()

@ray.remote(num_cpus=0.1)
class Guard:
    def here(self): return True

guards = [Guard.options(resources={node: 1}).remote() for node in sys.argv[1:]]
ray.get([guard.here.remote() for guard in guards])
print("guarded", flush=True)
time.sleep(1000)
"""


def test_nodes_and_workers_die_nodes_come_back_and_nothing_is_left_at_the_end() -> None:
    with RayCluster(workers=1) as cluster:
        cluster.wait_alive({"head", "node1"}, 30)
        driver = cluster.run_driver([sys.executable, "-c", STAY, "head", "node1"])
        until = time.monotonic() + 90
        while "guarded" not in driver.output():
            assert driver.holder.poll() is None and time.monotonic() < until, driver.output()
            time.sleep(0.1)
        guards = cluster.workers_named("Guard")
        on_node = cluster.workers_named("Guard", node="node1")
        raylets = cluster.processes(r"raylet/raylet\b")
        cluster.kill_node("node1", everything=False)
        noticed = cluster.wait_alive({"head"}, 20)
        psutil.wait_procs(on_node, timeout=20)
        orphans = [process for process in on_node if process.is_running()]
        cluster.kill_node("node1")
        rest = cluster.processes(node="node1")
        cluster.add_node("node1")
        cluster.wait_alive({"head", "node1"}, 30)
        driver.kill()
        status = driver.wait(10)
        family = cluster.processes()

    assert len(guards) == 2 and len(on_node) == 1 and len(raylets) == 2
    assert noticed < 6 and not orphans and not rest and status == -9
    assert len(family) > 6 and not [process for process in family if process.is_running()]
    assert not cluster.scratch.exists()
