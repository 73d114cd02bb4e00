"""The outer server as islands see it: real processes, real sockets, real kills."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outer_process import SIZES, TEST_SECRET, VALUES, WHOLE, OuterProcess, Rank, joined

from tigerbot.errors import TigerError
from tigerbot_jobs.train.islands.client import Client, Unreachable
from tigerbot_jobs.train.islands.frames import GREETING, MAGIC, FrameError, Limits, receive
from tigerbot_jobs.train.islands.layout import Piece

Start = Callable[..., OuterProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with plain averaging (rate 1, no momentum), so that numbers are read off."""
    servers = []

    def started(**settings: Any) -> OuterProcess:
        server = OuterProcess(
            tmp_path / f"outer-{len(servers)}", **({"count": 2, "lr": 1.0, "momentum": 0.0} | settings)
        )
        servers.append(server)
        return server

    yield started
    for server in servers:
        server.kill()


def test_islands_move_by_the_mean_of_their_deltas_and_see_the_same_weights(start: Start) -> None:
    server = start()
    a, b = Rank(server, 0), Rank(server, 1)
    joined(a, b, value=5.0)

    answers = [future.result(30) for future in (a.bring(1.0), b.bring(3.0))]

    assert all(answer.round == 1 and answer.header["counted"] for answer in answers)
    assert np.allclose(answers[0].weights, 5.0 - 2.0, atol=1e-5)
    assert (answers[0].weights == answers[1].weights).all()


def test_an_island_of_two_ranks_meets_one_of_one(start: Start) -> None:
    server = start()
    whole = Rank(server, 0)
    halves = [
        Rank(server, 1, rank=0, pieces=[Piece("a.bias", 0, 10), Piece("b.weight", 0, 300)]),
        Rank(server, 1, rank=1, pieces=[Piece("b.weight", 300, 400)]),
    ]
    joined(whole, *halves, value=0.0)

    for step in (1, 2, 3):
        values = np.random.default_rng(step).standard_normal(VALUES).astype(np.float32)
        futures = [whole.bring(values), halves[0].bring(values[:310]), halves[1].bring(values[310:])]
        for future in futures:
            future.result(30)

    assert (np.concatenate([half.base for half in halves]) == whole.base).all()
    assert not np.allclose(whole.base, 0)


def test_a_late_island_is_not_counted_takes_the_global_weights_and_is_in_the_next_round(start: Start) -> None:
    server = start(deadline_s=0.5)
    a, b = Rank(server, 0), Rank(server, 1)
    joined(a, b)

    began = time.monotonic()
    a.bring(1.0).result(30)
    waited = time.monotonic() - began
    late = b.bring(100.0).result(30)
    both = [future.result(30) for future in (a.bring(2.0), b.bring(4.0))]

    assert 0.4 < waited < 3
    assert not late.header["counted"] and late.round == 1 and np.allclose(late.weights, -1, atol=1e-5)
    assert all(answer.header["counted"] and np.allclose(answer.weights, -4, atol=1e-4) for answer in both)
    assert [row["missed"] for row in server.rounds()] == [[1], []]


def test_an_island_that_missed_a_round_is_not_waited_for_again(start: Start) -> None:
    server = start(deadline_s=1.5)
    a, b = Rank(server, 0), Rank(server, 1)
    joined(a, b)
    a.bring(1.0).result(30)

    began = time.monotonic()
    a.bring(1.0).result(30)

    assert time.monotonic() - began < 1.0


def test_a_server_that_is_killed_in_mid_round_goes_on_where_it_was(start: Start) -> None:
    server = start(momentum=0.9)
    a, b = Rank(server, 0), Rank(server, 1)
    undisturbed = start(momentum=0.9)
    c, d = Rank(undisturbed, 0), Rank(undisturbed, 1)
    for pair in ((a, b), (c, d)):
        joined(*pair)
        for future in [rank.bring(1.0) for rank in pair]:
            future.result(30)

    waiting = a.bring(2.0)
    time.sleep(0.3)
    server.kill()
    time.sleep(0.3)
    server.start()
    answers = [future.result(30) for future in (b.bring(3.0), waiting)]
    for future in (c.bring(2.0), d.bring(3.0)):
        future.result(30)

    assert [answer.round for answer in answers] == [2, 2]
    assert all(answer.header["counted"] for answer in answers)
    assert (a.base == c.base).all() and (b.base == c.base).all()


def test_an_answer_lost_on_the_way_is_given_again_and_the_delta_is_counted_once(start: Start) -> None:
    server = start(count=1)
    a = Rank(server, 0)
    joined(a)
    base, first = a.base, a.bring(1.0).result(30)

    a.client.close()
    a.base, a.round = base, 0
    again = a.bring(1.0).result(30)

    assert again.header["counted"] and again.round == 1
    assert (again.weights == first.weights).all() and np.allclose(first.weights, -1, atol=1e-5)


ISLAND = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from outer_process import Rank
class Server: address = sys.argv[2]
rank = Rank(Server, 1)
rank.join().result(30)
print("joined", flush=True)
time.sleep(60)
"""


def test_an_island_killed_in_mid_round_costs_the_other_a_moment_and_joins_again(start: Start) -> None:
    server = start(deadline_s=60)
    a = Rank(server, 0)
    here = str(Path(__file__).parent)
    island = subprocess.Popen([sys.executable, "-c", ISLAND, here, server.address], stdout=subprocess.PIPE, text=True)
    try:
        a.join().result(30)
        assert island.stdout is not None and island.stdout.readline() == "joined\n"
        waiting = a.bring(1.0)
        time.sleep(0.2)
        os.kill(island.pid, signal.SIGKILL)
        began = time.monotonic()
        waiting.result(30)
        waited = time.monotonic() - began
    finally:
        island.kill()
        island.wait()
    again = Rank(server, 1)
    answer = again.join().result(30)
    both = [future.result(30) for future in (a.bring(1.0), again.bring(3.0))]

    assert waited < 8  # the grace of 5 s, not the deadline of 60
    assert answer.round == 1 and np.allclose(answer.weights, -1, atol=1e-5)
    assert all(np.allclose(one.weights, -3, atol=1e-4) for one in both)


def test_half_an_island_is_not_counted(start: Start) -> None:
    server = start(deadline_s=0.5)
    whole = Rank(server, 0)
    half = Rank(server, 1, pieces=[Piece("a.bias", 0, 10)])
    joined(whole, half)

    arrived = half.bring(50.0)
    answer = whole.bring(1.0).result(30)

    assert np.allclose(answer.weights, -1, atol=1e-5)
    assert not arrived.result(30).header["counted"]


def test_a_delta_that_is_not_finite_is_refused_and_its_island_gets_the_global_weights(start: Start) -> None:
    server = start()
    a, b = Rank(server, 0), Rank(server, 1)
    joined(a, b)

    bad, good = b.bring(float("nan")), a.bring(1.0)

    assert good.result(30).header["counted"] and not bad.result(30).header["counted"]
    assert np.allclose(a.base, -1, atol=1e-5) and (a.base == b.base).all()
    assert server.rounds()[0]["refused"] == [1]


def test_a_wrong_secret_is_refused_and_the_right_one_still_served(start: Start) -> None:
    server = start(count=1)
    stranger = Client(server.address, "a guess", island=0, rank=0, incarnation="x")

    with pytest.raises(TigerError, match="wrong secret"):
        stranger.join(SIZES, WHOLE, np.zeros(VALUES, np.float32), patience_s=10)

    assert Rank(server, 0).join().result(30).round == 0


def test_another_model_is_refused_by_name(start: Start) -> None:
    server = start(count=1)
    joined(Rank(server, 0))
    other = Client(server.address, TEST_SECRET, island=0, rank=0, incarnation="x")

    with pytest.raises(TigerError, match=r"another model: b.weight has 701 values here, 700 at the server"):
        other.join(SIZES | {"b.weight": 701}, WHOLE, np.zeros(VALUES, np.float32), patience_s=10)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack("<4sIQ", MAGIC, 100, 1 << 50), "at most 4096 + 0"),
        (struct.pack("<4sIQ", MAGIC, 1 << 31, 0), "at most 4096 + 0"),
        (b"GET / HTTP/1.1\r\n\r\n", "is not a frame"),
        (struct.pack("<4sIQ", MAGIC, 4, 0) + b"\xff{[}", "not JSON"),
        (struct.pack("<4sIQ", MAGIC, 2, 0) + b"[]", "not an object"),
        (struct.pack("<4sIQ", MAGIC, 2, 0) + b"{}", "bad frame"),
    ],
)
def test_bytes_that_are_no_greeting_are_refused_and_nothing_is_read_beyond_the_limit(
    start: Start, sent: bytes, reason: str
) -> None:
    server = start(count=1)
    host, _, port = server.address.partition(":")

    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        receive(stranger, GREETING)
        stranger.sendall(sent)
        reply = receive(stranger, Limits())
        with pytest.raises((FrameError, OSError)):
            receive(stranger, Limits())

    assert reason in reply.header["error"]
    assert Rank(server, 0).join().result(30).round == 0


def test_a_body_larger_than_the_model_is_refused(start: Start) -> None:
    server = start(count=1)
    a = Rank(server, 0)
    joined(a)

    with pytest.raises((TigerError, Unreachable)) as refused:
        a.client.exchange(0, 1, WHOLE, np.zeros(100_000, np.float32), a.base, patience_s=3, reach_s=1)

    assert "at most" in str(refused.value)
    assert Rank(server, 0).join().result(30).round == 0


def test_without_a_server_patience_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    client = Client(address, TEST_SECRET, island=0, rank=0, incarnation="x")

    began = time.monotonic()
    with pytest.raises(Unreachable):
        client.exchange(0, 1, WHOLE, np.zeros(VALUES, np.float32), np.zeros(VALUES), patience_s=60, reach_s=0.5)

    assert time.monotonic() - began < 3
