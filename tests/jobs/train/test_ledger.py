"""The ledger file: what a kill, a full disk and a stranger's line leave readable, and what never stops training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigerbot.errors import InputError
from tigerbot_jobs.train.ledger import Clock, Ledger, Tail, read_events


def kinds(path: Path) -> list[str]:
    return [event.kind for event in read_events(path)]


def test_what_is_written_is_read_back_with_both_clocks_and_the_drivers_life(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.jsonl"

    with Ledger(path, clock=Clock(wall=lambda: 1000.0, monotonic=lambda: 5.0), driver="aaaa0000") as ledger:
        ledger.write("fault_seen", fault="hang", rank=3, evidence="第 3 张卡在 backward 停了 8 s\nno beat")

    first, seen = read_events(path)
    assert first.kind == "ledger" and first.whole("format_version") == 1
    assert (seen.t, seen.m, seen.driver, seen.kind) == (1000.0, 5.0, "aaaa0000", "fault_seen")
    assert seen.whole("rank") == 3 and seen.text("evidence") == "第 3 张卡在 backward 停了 8 s\nno beat"


def test_a_line_that_a_kill_cut_off_is_closed_by_the_next_driver_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as first:
        first.write("scheduled")
        first.write("steps", rows=[[1, 0.5, 0, 0, 0, 0, 100]])
    os.truncate(path, path.stat().st_size - 20)

    with Ledger(path) as second:
        second.write("driver_started")

    assert kinds(path) == ["ledger", "scheduled", "driver_started"]
    assert second.driver != first.driver


def test_a_driver_that_was_killed_at_any_byte_leaves_a_ledger_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.write("scheduled")
    whole = path.read_bytes()

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Ledger(path) as ledger:
            ledger.write("stopped", reason="done")

        assert kinds(path)[-1] == "stopped" and "ledger" in kinds(path)


def test_lines_of_another_age_are_skipped_and_fields_of_another_type_read_as_their_default(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    good = {"t": 1, "m": 1, "driver": "a", "kind": "restored", "step": "seven", "tier": None, "rows": 3}
    bad = ["", "null", "[1]", '{"t": 1}', '{"t": NaN, "m": 1, "driver": "a", "kind": "x"}', "\x00\x01", "[" * 5000]
    path.write_text("\n".join([*bad, json.dumps(good), *bad]) + "\n")

    events = read_events(path)

    assert [event.kind for event in events] == ["restored"]
    assert events[0].whole("step", -1) == -1 and events[0].text("tier") == "" and events[0].items("rows") == []


def test_a_newer_ledger_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"t": 1, "m": 1, "driver": "a", "kind": "ledger", "format_version": 9}\n')

    with pytest.raises(InputError, match="format 9, this software reads 1"):
        read_events(path)


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.write("steps", rows=[[1, math.nan, math.inf]], loss=-math.inf, where=Path("/x"))

    event = json.loads(path.read_text().splitlines()[-1])

    assert event["rows"] == [[1, None, None]] and event["loss"] is None and event["where"] == "/x"


def test_a_full_disk_is_said_once_counted_and_noted_when_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.symlink_to("/dev/full")

    with Ledger(path) as ledger:
        for _ in range(5):
            ledger.write("scheduled")
        path.unlink()
        ledger.write("stopped", reason="done")

    assert ledger.errors >= 6
    assert capsys.readouterr().err.count("training goes on") == 1
    assert kinds(path) == ["ledger", "stopped", "gap"]
    assert read_events(path)[-1].whole("lines") == 5


def test_a_disk_that_takes_half_a_line_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    program = (
        "import resource, signal, sys\n"
        "from tigerbot_jobs.train.ledger import Ledger\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "ledger = Ledger(sys.argv[1])\n"
        "limit = ledger.path.stat().st_size + 50\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "ledger.write('scheduled', note='x' * 100)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "ledger.write('stopped', reason='done')\n"
        "ledger.close()\n"
    )

    subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True)

    assert kinds(path) == ["ledger", "stopped", "gap"]


def test_a_folder_that_cannot_be_made_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    with Ledger(tmp_path / "file" / "ledger.jsonl") as ledger:
        ledger.write("scheduled")

    assert ledger.errors == 2 and "File exists" in capsys.readouterr().err


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        writers = [
            threading.Thread(target=lambda n=n: [ledger.write("steps", writer=n, row=i) for i in range(200)])
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()

    rows = [(event.whole("writer"), event.whole("row")) for event in read_events(path)[1:]]
    assert len(rows) == 800 and all([r for w, r in rows if w == n] == list(range(200)) for n in range(4))
    stamps = [event.m for event in read_events(path)]
    assert stamps == sorted(stamps)


def test_a_tail_gives_each_event_once_and_leaves_half_a_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.write("scheduled")
    tail, whole = Tail(path), path.read_bytes()
    first = [event.kind for event in tail.read()]

    path.write_bytes(whole + whole[:30])
    nothing = tail.read()
    path.write_bytes(whole + whole)
    rest = [event.kind for event in tail.read()]

    assert first == rest == ["ledger", "scheduled"] and nothing == []


def test_a_missing_ledger_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ledger.jsonl: no such file"):
        read_events(tmp_path / "ledger.jsonl")


@given(st.binary(max_size=300))
def test_no_bytes_whatever_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "ledger.jsonl"
    path.write_bytes(content)

    events = read_events(path)

    assert all(math.isfinite(event.m) for event in events)
