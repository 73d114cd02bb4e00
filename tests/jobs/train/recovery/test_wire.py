"""What goes over the line between hub, workers and keepers, and who is let in."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

import pytest

from tigerbot.spec import TrainSpec, parse_spec
from tigerbot.storage import open_store
from tigerbot_jobs.train.ledger import Ledger, read_events
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.hub import Hub
from tigerbot_jobs.train.recovery.link import Link
from tigerbot_jobs.train.recovery.persist import Persister
from tigerbot_jobs.train.recovery.run import standbys_of
from tigerbot_jobs.train.recovery.settings import HubSettings
from tigerbot_jobs.train.recovery.wire import decode, encode

SHARD = say.ShardAt("/dev/shm/x", 64, 10, "n", "n:1", 7, 1, 0, 2, 2)


@pytest.mark.parametrize(
    "message",
    [
        say.Ready(),
        say.Form(2, 0, 2, "memory", 7, [SHARD], skips=[[3, 4]], guard={"bad": []}),
        say.Held(1, [SHARD]),
        say.Out(2, 7, "bug", text="狐狸", key="a|b|7", error={"type": "DataError", "what": "w"}),
    ],
)
def test_a_message_survives_the_wire(message: say.Message) -> None:
    line = encode(message)

    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line", [b"", b"[]", b'{"type": "Nothing"}', b'{"type": "Ready", "more": 1}', b'{"type": "Meet"}']
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


@pytest.fixture
def hub(tmp_path: Path):
    persister = Persister(open_store(str(tmp_path)), "run/checkpoints", keep=3, every_s=None, cards=2)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    made = Hub(HubSettings(2, 2, 2, "secret"), ledger, persister, on_row=lambda row: None, on_node=lambda hello: None)
    yield made, made.start("127.0.0.1"), tmp_path / "ledger.jsonl"
    made.close()
    ledger.close()


def hello(name: str, token: str = "secret") -> say.Hello:
    return say.Hello(token, "worker", name, "n", "host", "127.0.0.1", 1)


def joined(ledger: Path) -> list[str]:
    return [event.text("worker") for event in read_events(ledger) if event.kind == "worker_joined"]


def test_nobody_without_the_secret_is_let_in(hub) -> None:
    _, address, ledger = hub
    host, port = address.split(":")

    for line in (encode(hello("stranger", "wrong")), b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100 + b"\n"):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(line)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(10) == b""

    assert joined(ledger) == []


def test_two_workers_that_are_ready_are_formed_and_a_death_calls_the_generation_off(hub) -> None:
    _, address, ledger = hub
    first, second = Link(address, hello("a")), Link(address, hello("b"))
    for link in (first, second):
        link.send(say.Ready())
    forms = [link.order() for link in (first, second)]

    assert [type(form) for form in forms] == [say.Form, say.Form]
    assert {form.rank for form in forms if isinstance(form, say.Form)} == {0, 1}
    broken: list[float] = []
    first.enter(forms[0], lambda: broken.append(time.monotonic()))  # type: ignore[arg-type]
    began = time.monotonic()
    second.close()
    while not broken and time.monotonic() < began + 5:
        time.sleep(0.005)

    assert broken and broken[0] - began < 1
    faults = [event.fields for event in read_events(ledger) if event.kind == "fault_seen"]
    assert [(fault["fault"], fault["worker"]) for fault in faults] == [("process", "b")]


def test_when_the_hub_is_gone_a_worker_is_told_to_stop_and_leaves_its_collectives(hub) -> None:
    made, address, _ = hub
    link, broken = Link(address, hello("a")), []
    link.enter(say.Form(1, 0, 1, "none", 0), lambda: broken.append(1))

    made.close()
    order = link.order()

    assert isinstance(order, say.Stop)


def test_a_ledger_is_json_lines_that_anybody_can_read(hub) -> None:
    _, address, ledger = hub
    link = Link(address, hello("a"))
    link.say("note", text="你好")
    until = time.monotonic() + 5
    while "你好" not in ledger.read_text(encoding="utf-8") and time.monotonic() < until:
        time.sleep(0.01)

    kinds = [json.loads(line)["kind"] for line in ledger.read_text(encoding="utf-8").splitlines()]
    assert kinds[0] == "ledger" and "note" in kinds


def test_the_interval_of_checkpoints_follows_young_and_daly(tmp_path: Path) -> None:
    def interval(faults: int, write_s: float) -> float:
        made = Persister(open_store(str(tmp_path)), "x", keep=1, every_s=None, cards=1024)
        made._write_s = write_s
        for _ in range(faults):
            made.fault()
        return made.interval_s()

    assert interval(1000, 1.0) < interval(10, 1.0) <= 1800
    assert interval(100, 100.0) >= 200  # at least twice what writing takes


@pytest.mark.parametrize(
    ("workers", "standbys", "slots", "wanted"),
    [(2, "auto", 3, 1), (2, "auto", 2, 0), (1, "auto", 8, 0), ((1, 4), "auto", 8, 1), (2, 3, 2, 3)],
)
def test_a_standby_waits_where_a_slot_is_free(workers, standbys, slots: int, wanted: int) -> None:
    raw = {"kind": "train", "name": "x", "model": {"preset": "tiny"}, "data": {"train": [{"path": "x"}]}}
    spec = parse_spec(raw | {"train": {"tokens": 1}, "scale": {"workers": workers, "standbys": standbys}})
    assert isinstance(spec, TrainSpec)

    assert standbys_of(spec, slots) == wanted
