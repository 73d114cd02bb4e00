"""The queue between a job and its courier, and the journal: whatever is killed, nothing lost and nothing doubled."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.errors import TrackingError
from tigerbot.outbox import Outbox
from tigerbot.spool import Position, SpoolFull, SpoolReader, SpoolWriter, backlog, has_writer

LIMIT = 2**20


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.records"))


def drained(reader: SpoolReader, limit: int = 7) -> list[dict]:
    found, position = [], reader.applied
    while True:
        more, position = reader.read(position, limit)
        if not more:
            reader.arrived(position)
            return found
        found += more


# What may happen to a writer, to a reader and to the disk, in any order.
EVENTS = st.one_of(
    st.tuples(st.just("say"), st.integers(1, 5)),
    st.tuples(st.just("writer killed in a write"), st.integers(0, 60)),
    st.tuples(st.just("delivered"), st.integers(1, 9)),
    st.tuples(st.just("courier killed before the watermark"), st.integers(1, 9)),
    st.tuples(st.just("watermark lost"), st.just(0)),
    st.tuples(st.just("watermark torn"), st.just(0)),
    st.tuples(st.just("forgotten"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENTS, max_size=25), segment_bytes=st.sampled_from([1, 60, 200, 10_000]))
def test_whatever_is_killed_every_record_arrives_in_order(tmp_path_factory, events, segment_bytes) -> None:
    folder = tmp_path_factory.mktemp("spool")
    writer = SpoolWriter(folder, limit_bytes=LIMIT, segment_bytes=segment_bytes)
    reader = SpoolReader(folder)
    said, heard = 0, []

    def hear(limit: int) -> Position:
        records, position = reader.read(reader.applied, limit)
        heard.extend(record["n"] for record in records)
        return position

    for event, amount in events:
        if event == "say":
            for _ in range(amount):
                writer.append({"n": said, "value": said / 3})
                said += 1
        elif event == "writer killed in a write":
            writer.close()
            if segments(folder):
                with segments(folder)[-1].open("ab") as file:
                    file.write(b'0badc0de {"n":-1,"value":0.3333333333333333333333333333333333}'[:amount])
            writer = SpoolWriter(folder, limit_bytes=LIMIT, segment_bytes=segment_bytes)
        elif event == "delivered":
            reader.arrived(hear(amount))
        elif event == "courier killed before the watermark":
            hear(amount)
            reader = SpoolReader(folder)
        elif event.startswith("watermark"):
            (folder / "applied").unlink(missing_ok=True)
            if event == "watermark torn":
                (folder / "applied").write_text("1")
            reader = SpoolReader(folder)
        else:  # by the courier of a killed job, while the next life of the job speaks
            reader.forget()
    writer.append({"n": said, "value": 0.0})
    writer.close()
    while backlog(folder):
        reader.arrived(hear(3))
    reader.forget()

    first = dict.fromkeys(heard)  # in the order of their first arrival
    assert list(first) == list(range(said + 1))
    assert segments(folder) == []  # what has arrived takes no room


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=8), st.floats() | st.integers() | st.text()), max_size=8))
def test_records_come_back_bit_for_bit(tmp_path_factory, records) -> None:
    folder = tmp_path_factory.mktemp("spool")
    writer = SpoolWriter(folder, limit_bytes=LIMIT)
    for record in records:
        writer.append(record)
    writer.close()

    assert json.dumps(drained(SpoolReader(folder))) == json.dumps(records)


def test_a_reader_beside_a_writer_misses_nothing(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, limit_bytes=LIMIT, segment_bytes=100)
    talking = threading.Thread(target=lambda: [writer.append({"n": n}) for n in range(1000)])
    talking.start()
    reader, heard = SpoolReader(tmp_path), []
    while len(heard) < 1000 and (talking.is_alive() or backlog(tmp_path)):
        records, position = reader.read(reader.applied, 50)
        heard += [record["n"] for record in records]
        reader.arrived(position)
    talking.join()
    writer.close()

    assert heard == list(range(1000))


def test_a_queue_takes_no_more_than_its_limit_until_something_has_arrived(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, limit_bytes=2000, segment_bytes=500)
    with pytest.raises(SpoolFull):
        for n in range(1000):
            writer.append({"n": n})
    held = backlog(tmp_path)
    reader = SpoolReader(tmp_path)
    reader.arrived(reader.read(reader.applied, 40)[1])
    writer.append({"n": "again"})
    writer.close()

    assert 1500 < held <= 2000
    assert drained(reader)[-1] == {"n": "again"}


def test_a_record_that_the_disk_damaged_costs_itself(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, limit_bytes=LIMIT)
    for n in range(3):
        writer.append({"n": n})
    writer.close()
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":7'))

    reader = SpoolReader(tmp_path)
    assert drained(reader) == [{"n": 0}, {"n": 2}]
    assert reader.damaged == 1


def test_a_second_writer_is_told_who_holds_the_queue(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, limit_bytes=LIMIT)

    with pytest.raises(TrackingError, match="another process tracks this run"):
        SpoolWriter(tmp_path, limit_bytes=LIMIT)
    assert has_writer(tmp_path)
    writer.close()
    assert not has_writer(tmp_path)


@pytest.mark.root
def test_on_a_full_disk_nothing_is_half_written(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1m")
    journal, writer = Outbox(disk / "trials.jsonl"), SpoolWriter(disk / "spool", limit_bytes=100 * LIMIT)
    kept = dict.fromkeys((journal, writer), 0)
    for file, larger in ((journal, "2m"), (writer, "3m")):
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.append({"n": kept[file], "text": "x" * 1000})
                kept[file] += 1
        small_disk(larger)
        file.append({"n": kept[file]})
        file.close()

    assert [record["n"] for record in Outbox(disk / "trials.jsonl").records()] == list(range(kept[journal] + 1))
    assert [record["n"] for record in drained(SpoolReader(disk / "spool"))] == list(range(kept[writer] + 1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=8), st.integers()), max_size=12), st.integers(0, 40))
def test_a_journal_cut_anywhere_keeps_every_whole_record(tmp_path_factory, records, cut) -> None:
    path = tmp_path_factory.mktemp("outbox") / "o.jsonl"
    outbox = Outbox(path)
    for record in records:
        outbox.append(record)
    outbox.close()
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])

    again = Outbox(path)
    again.append({"new": 1})
    again.close()

    kept = list(again.records())
    assert kept[-1] == {"new": 1}
    assert kept[:-1] == records[: len(kept) - 1]
