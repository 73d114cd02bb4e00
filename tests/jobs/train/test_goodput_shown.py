"""What a person sees of an account: the verb, the page, the endpoint for Prometheus."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest
import typer
from ledger_story import Story
from typer.testing import CliRunner

from tigerbot.errors import InputError, StorageError
from tigerbot.runs import hold_folder, write_json
from tigerbot_jobs.commands import register
from tigerbot_jobs.shown import clock, span
from tigerbot_jobs.train.exporter import Exporter, Live, metrics_text
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.goodput_text import find_ledger
from tigerbot_jobs.train.ledger import read_events


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A storage folder with a run that lost a node, went on with fewer, grew and was done."""
    (tmp_path / "pretrain").mkdir()
    story = Story(tmp_path / "pretrain").ready().steps(20, data=0.1, snapshot=0.05).wait(1.5)
    story.fault("node", evidence="<script>alert('x')</script> \x1b[31m第 1 个节点没有心跳").decide("shrink")
    story.step -= 3
    story.group("fault", size=1).steps(10, each=2.0).decide("grow").group("grow", size=2).steps(10)
    story.fault("nan").decide("skip").steps(5).write("stopped", reason="done").close()
    write_json(tmp_path / "pretrain" / "spec.json", {"hash": "0", "spec": {"kind": "train"}})
    rows = [{"step": step, "loss": 9 / step} for step in [*range(1, 21), *range(18, 43)]]
    lines = [*map(json.dumps, rows), '{"step": 43, "loss": null}', '{"step": 4', "[]"]
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path


def tiger(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    result = CliRunner().invoke(app, ["goodput", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_table_says_where_each_second_went_and_what_it_cost(folder: Path) -> None:
    said = tiger("pretrain", "--in", str(folder))

    seconds = dict(re.findall(r"^  (\w+(?: time)?) +([\d,.]+) ", said, re.MULTILINE))
    assert said.startswith("pretrain: done, 1 min 10 s of wall time")
    assert float(seconds.pop("wall time")) == pytest.approx(sum(map(float, seconds.values())), abs=0.5)
    assert "recompute                    3.0" in said and "at 3 a card-hour" in said
    assert "2 incidents; recovery p50 2.75 s" in said and "\x1b" not in said
    assert "node (rank 1, w1, n1), seen after 1.50 s, shrink, back after 2.75 s from memory" in said
    assert "nan (rank 1, w1, n1), skip, training went on" in said


def test_a_price_given_by_hand_wins(folder: Path) -> None:
    said = json.loads(tiger("pretrain", "--in", str(folder), "--json", "--price", "100"))

    assert said["cost"] == pytest.approx(100 * said["card_hours"]) and said["state"] == "done"
    assert sum(said["seconds"].values()) == pytest.approx(said["wall_s"])
    assert said["incident_list"][0]["steps_lost"] == 3 and said["resize_list"][0]["kind"] == "grow"


def test_a_run_is_found_by_name_by_folder_and_by_its_ledger(folder: Path) -> None:
    run = folder / "pretrain"

    found = {find_ledger(given, folder) for given in ("pretrain", str(run), str(run / "ledger.jsonl"))}

    assert found == {run / "ledger.jsonl"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pretrian", r"no run is called 'pretrian'; did you mean pretrain\?"),
        ("zzz", r"no run is called 'zzz'; there is: pretrain"),
        ("corpus", r"is a run of kind corpus; only kind: train keeps a ledger"),
        ("young", r"has no ledger yet"),
        ("x" * 5000, r"file name too long"),
    ],
)
def test_a_run_that_is_not_there_is_one_clear_line(folder: Path, given: str, said: str) -> None:
    for name, kind in (("corpus", "corpus"), ("young", "train")):
        (folder / name).mkdir()
        write_json(folder / name / "spec.json", {"spec": {"kind": kind}})

    with pytest.raises(InputError, match=said):
        tiger(given, "--in", str(folder))


def test_a_run_that_lives_is_running_and_one_that_nobody_holds_died(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    Story(tmp_path / "r").ready().steps(3).close()

    died = json.loads(tiger("r", "--in", str(tmp_path), "--json"))
    lock = hold_folder(tmp_path / "r")
    running = json.loads(tiger("r", "--in", str(tmp_path), "--json"))
    lock.close()

    assert died["state"] == "interrupted" and died["wall_s"] == pytest.approx(15)
    assert running["state"] == "running" and running["wall_s"] > 15


def test_the_page_is_whole_escapes_everything_and_wants_nothing_from_outside(folder: Path) -> None:
    page = folder / "page.html"

    tiger("pretrain", "--in", str(folder), "--html", str(page))

    text = page.read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 5  # the bar, over time, the node, the growth, the loss
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert "<script" not in text and "&lt;script&gt;" in text and "\x1b" not in text
    assert "src=" not in text and "http" not in text.replace("http-equiv", "") and "@import" not in text
    assert "rolled back from step 20 to 17" in text and "第 1 个节点没有心跳" in text


def test_the_page_of_a_run_that_has_just_begun_is_there_too(tmp_path: Path) -> None:
    Story(tmp_path).driver().close()

    tiger(str(tmp_path), "--html", str(tmp_path / "page.html"))

    assert "no loss was logged" in (tmp_path / "page.html").read_text()


def test_an_incident_that_is_not_over_shows_what_is_going_on(tmp_path: Path) -> None:
    Story(tmp_path).ready().steps(5).wait(2).fault("hang").decide("kill").wait(20).write("worker_ready").close()

    tiger(str(tmp_path), "--html", str(tmp_path / "page.html"))

    text = (tmp_path / "page.html").read_text()
    assert "waiting for driver or workers: 20.000 s" in text and "not back yet" in text and "first step: " not in text


def test_a_page_that_cannot_be_written_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"page\.html: no such file or directory; give a file"):
        tiger("pretrain", "--in", str(folder), "--html", str(folder / "nowhere" / "page.html"))


def test_prometheus_reads_the_account_and_what_the_driver_knows(folder: Path) -> None:
    found = account(read_events(folder / "pretrain" / "ledger.jsonl"))

    with Exporter(lambda: Live(found, step=42, loss=0.25)) as exporter:
        answer = httpx.get(exporter.url)
        elsewhere = httpx.get(exporter.url.replace("/metrics", "/"))

    values = dict(re.findall(r"^(\S+) (\S+)$", answer.text, re.MULTILINE))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4") and elsewhere.status_code == 404
    assert float(values['tiger_goodput_ratio{run="pretrain"}']) == found.goodput
    assert float(values['tiger_seconds{run="pretrain",category="recompute"}']) == found.seconds["recompute"]
    assert values['tiger_faults{run="pretrain",fault="node"}'] == "1"
    assert values['tiger_tokens_per_second{run="pretrain"}'] == "NaN" and values['tiger_step{run="pretrain"}'] == "42"


def test_the_text_is_what_a_prometheus_parser_takes(folder: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    (folder / "odd").mkdir()
    story = Story(folder / "odd").ready().steps(1).fault('a"b\\c\nd')
    story.close()
    found = account(read_events(story.path))

    text = "".join(f"{line}\n" for line in metrics_text(Live(found, step=1, loss=math.inf)))

    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["tiger_faults"].samples[0].labels["fault"] == 'a"b\\c\nd'
    assert families["tiger_loss"].samples[0].value == math.inf


def test_many_scrapers_cost_one_account_and_a_failing_one_is_a_failed_target(folder: Path) -> None:
    found = account(read_events(folder / "pretrain" / "ledger.jsonl"))
    reads: list[int] = []

    def read() -> Live:
        reads.append(1)
        if len(reads) == 1:
            raise RuntimeError("the ledger is being moved")
        return Live(found, step=1)

    with Exporter(read) as exporter:
        failed = httpx.get(exporter.url)
        scrapers = [threading.Thread(target=httpx.get, args=(exporter.url,)) for _ in range(8)]
        for scraper in scrapers:
            scraper.start()
        for scraper in scrapers:
            scraper.join()

    assert failed.status_code == 500 and len(reads) == 2


def test_a_port_that_is_taken_is_said_before_anything_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen there"):
            Exporter(lambda: pytest.fail("is never asked"), port=port)


def test_lengths_and_moments_are_short_to_read() -> None:
    assert [span(s) for s in (0.1234, 75, 3700, 100000)] == ["0.123 s", "1 min 15 s", "1 h 1 min", "1 d 3 h"]
    assert clock(3 * 3600 + 7 * 60 + 15.9) == "3:07:15"
