"""What stories are made of, shown to work: lines, disks, clocks, buckets and random damage."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from clocks import WallClock, later_boot
from damage import Action, Damage
from disks import small_disk
from processes import Leashed
from relay import Relay
from s3 import BUCKET, s3_server


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends everything back, and says bye when its client has ended."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
                while data := client.recv(65536):
                    client.sendall(data)
                client.sendall(b"bye")
                client.close()
            except ConnectionError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def round_trip(end: socket.socket, data: bytes = b".") -> float:
    began, got = time.monotonic(), b""
    end.sendall(data)
    while len(got) < len(data):
        got += end.recv(65536)
    assert got == data
    return time.monotonic() - began


def test_a_line_is_late_slow_silent_half_closed_and_cut_when_told(echo: int) -> None:
    data = random.Random(1).randbytes(200_000)
    with Relay("127.0.0.1", echo) as relay, socket.create_connection((relay.host, relay.port)) as end:
        end.settimeout(0.3)
        plain = round_trip(end, data)
        relay.latency(0.1)
        late = round_trip(end, data)
        relay.latency(0)
        relay.rate(1e6, "up")
        slow = round_trip(end, data)
        relay.rate(None)
        relay.stall("down")
        end.sendall(b"x")
        with pytest.raises(TimeoutError):
            end.recv(1)
        relay.go_on()
        heard = end.recv(1)
        relay.half_close("up")
        last = end.recv(10)
        with socket.create_connection((relay.host, relay.port)) as other:
            round_trip(other)
            cut = relay.cut()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
        passed = relay.passed()

    assert late >= 0.2 > plain and slow >= 0.19
    assert heard == b"x" and last == b"bye" and cut >= 1
    assert passed["up"] == 3 * len(data) + 2


@pytest.mark.root
def test_a_small_disk_is_full_until_it_is_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mb=8) as disk:
        disk.fill(leave_bytes=40_960)
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "large").write_bytes(bytes(1_000_000))
        disk.free()
        (disk.folder / "large").write_bytes(bytes(1_000_000))
        free = disk.free_bytes

    assert free > 7_000_000 - 8192 and not list((tmp_path / "disk").iterdir())


def test_the_wall_clock_of_a_living_process_jumps_and_nobody_elses_does(tmp_path: Path) -> None:
    clock = WallClock(tmp_path)
    story = "import time\nwhile input(): print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", story],
        env=os.environ | clock.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ahead() -> tuple[float, float]:
            assert process.stdin and process.stdout
            process.stdin.write(".\n")
            process.stdin.flush()
            wall, steady = map(float, process.stdout.readline().split())
            return wall - time.time(), steady - time.monotonic()

        before = ahead()
        clock.jump_to(3600)
        forward = ahead()
        clock.jump_to(-3600)
        back = ahead()
        process.kill()

    for found, wanted in ((before, 0), (forward, 3600), (back, -3600)):
        assert found[0] == pytest.approx(wanted, abs=1) and found[1] == pytest.approx(0, abs=1)


@pytest.mark.root
def test_a_machine_that_booted_earlier_has_another_monotonic_clock() -> None:
    story = "import time; print(time.monotonic(), time.time())"

    done = subprocess.run([*later_boot(100_000), sys.executable, "-c", story], capture_output=True, text=True)

    steady, wall = map(float, done.stdout.split())
    assert steady - time.monotonic() == pytest.approx(100_000, abs=5) and wall == pytest.approx(time.time(), abs=5)


def test_a_bucket_refuses_for_a_while_and_breaks_off_uploads() -> None:
    with s3_server() as s3:
        through = s3.environment()["AWS_ENDPOINT_URL"] + f"/{BUCKET}"
        before = httpx.put(f"{through}/before", content=b"x").status_code
        s3.refuse(2)
        began = time.monotonic()
        refused = httpx.put(f"{through}/meanwhile", content=b"x").status_code
        while httpx.put(f"{through}/after", content=b"x").status_code != 200 and time.monotonic() < began + 20:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        s3.cut_uploads()
        with pytest.raises(httpx.TransportError):
            httpx.put(f"{through}/cut", content=bytes(100_000))
        listed = httpx.get(s3.direct()["AWS_ENDPOINT_URL"] + f"/{BUCKET}").text

    assert before == 200 and refused == 500 and 2 <= seconds < 15
    assert re.findall("<Key>(.*?)</Key>", listed) == ["after", "before"]


def test_damage_is_the_same_for_a_seed_and_everybody_frozen_goes_on_at_the_end(tmp_path: Path) -> None:
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]

    def alive() -> list[psutil.Process]:
        return [psutil.Process(one.pid) for one in sleepers if one.poll() is None]

    try:
        actions = [Action("kill", "kill", alive), Action("freeze", "freeze", alive, weight=2)]
        first = Damage(actions, seed=5, log=tmp_path / "deeds.jsonl")
        first.start(every_s=0.05, seconds=0.3)
        time.sleep(0.5)
        deeds = first.stop()
        names = [deed.name for deed in deeds]
        states = {psutil.Process(one.pid).status() for one in sleepers if one.poll() is None}
        again = Damage([replace(one, find=list) for one in actions], seed=5)
        again.start(every_s=0.001, seconds=0.006)
        time.sleep(0.1)
        repeated = [deed.name for deed in again.stop()]
    finally:
        for one in sleepers:
            one.kill()
            one.wait()

    assert len(names) == 6 and {"kill", "freeze"} <= set(names) and psutil.STATUS_STOPPED not in states
    assert len((tmp_path / "deeds.jsonl").read_text().splitlines()) == 6
    assert repeated == names


def test_nothing_outlives_a_test_that_was_killed(tmp_path: Path) -> None:
    story = (
        f"import os, sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from processes import Leashed\n"
        f"held = Leashed(['sh', '-c', 'setsid sleep 1000 & setsid sleep 1000'], Path({str(tmp_path / 'log')!r}), os.environ)\n"
        "while len(held.processes()) < 3: time.sleep(0.01)\n"
        "print(*(process.pid for process in held.processes()), flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", story], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    family = [psutil.Process(int(pid)) for pid in holder.stdout.readline().split()]

    holder.send_signal(signal.SIGKILL)
    holder.wait()

    gone, alive = psutil.wait_procs(family, timeout=10)
    assert len(gone) == 3 and not alive


def test_a_leash_tells_the_exit_status_and_ends_what_was_left_running(tmp_path: Path) -> None:
    held = Leashed(["sh", "-c", "echo said; sleep 1000 & exit 3"], tmp_path / "log", os.environ)

    status, left = held.wait(10), held.processes()
    held.end()

    assert status == 3 and held.output() == "said\n" and len(left) == 1
    assert not left[0].is_running()
