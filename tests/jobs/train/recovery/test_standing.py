"""A standing group's desk: who is handed a job, who is waited for, and who is not let in."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tigerbot.spec import TrainSpec, parse_spec
from tigerbot_jobs.train.given import job_from
from tigerbot_jobs.train.prepared import WorkerJob
from tigerbot_jobs.train.recovery.messages import Back, Hello, Take
from tigerbot_jobs.train.recovery.standing import Desk
from tigerbot_jobs.train.recovery.wire import decode, encode


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk("127.0.0.1")
    yield made
    made.close()


def job(name: str = "t") -> WorkerJob:
    raw = {"kind": "train", "name": name, "model": {"preset": "tiny"}, "data": {"train": [{"path": "x"}]}}
    spec = parse_spec(raw | {"train": {"tokens": 10}, "deepspeed": {"zero_stage": 1}})
    assert isinstance(spec, TrainSpec)
    return WorkerJob(spec, "hash", "/run", [(Path("/tokens"), 0.5)], [Path("/held-out")], 1, hub="h:1", token="s")


class Line:
    """A worker's."""

    def __init__(self, desk: Desk, token: str | None = None) -> None:
        host, _, port = desk.place.address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        self.said = self.socket.makefile("rb")
        self.socket.sendall(encode(Hello(token or desk.place.token, "standing", "w", "", "host", "", 1)))

    def next_job(self) -> WorkerJob:
        message = decode(self.said.readline())
        assert isinstance(message, Take)
        return job_from(message.job)

    def back(self) -> None:
        self.socket.sendall(encode(Back()))

    def close(self) -> None:
        self.said.close()
        self.socket.close()


def test_a_job_goes_to_those_who_wait_and_to_those_who_come_while_it_lasts(desk: Desk) -> None:
    with closing(Line(desk)) as first, closing(Line(desk)) as second:
        desk.give(job("a"))
        got = [first.next_job(), second.next_job()]
        first.back()
        second.back()
        taken_back = desk.take_back(5)
        desk.give(job("b"))

        assert got == [job("a")] * 2 and taken_back
        assert first.next_job() == job("b")


def test_who_has_the_job_is_waited_for_unless_it_has_died(desk: Desk) -> None:
    desk.give(job())
    with closing(Line(desk)) as living, closing(Line(desk)) as dead:
        living.next_job()
        dead.next_job()

        early = desk.take_back(0.05)
        dead.close()
        living.back()

        assert not early
        assert desk.take_back(5)


def test_a_stranger_is_handed_nothing(desk: Desk) -> None:
    desk.give(job())

    with closing(Line(desk, token="guessed")) as stranger:
        assert stranger.said.readline() == b""


def test_a_desk_that_closes_lets_everybody_go(desk: Desk) -> None:
    with closing(Line(desk)) as waiting:
        desk.give(job())
        waiting.next_job()
        desk.close()

        assert waiting.said.readline() == b""
