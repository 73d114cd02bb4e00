"""What a request leaves behind: an audit line, counters, spans, a timeline; and what it must never leave."""

from __future__ import annotations

import json
import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tigerbot.errors import InputError
from tigerbot.spec.access import AuditSpec
from tigerbot_serve.gateway.audit import Audit, line_of
from tigerbot_serve.gateway.key_file import new_key
from tigerbot_serve.gateway.keys import Key, KeyRing
from tigerbot_serve.gateway.rotating import append
from tigerbot_serve.gateway.visit import Visit

HTTP = httpx.Client(timeout=30)
SECRET_TEXT = "the fox buried 4711 under the oak"
BODY = {"model": "tiger", "messages": [{"role": "user", "content": SECRET_TEXT}], "max_tokens": 16}


def post(url: str, key: str = "none", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    named = {"authorization": f"Bearer {key}"} | (headers or {})
    return HTTP.post(f"{url}/v1/chat/completions", json=BODY | fields, headers=named)


def lines(folder: Path, count: int) -> list[dict[str, Any]]:
    """The audit lines, when there are that many."""
    end = time.monotonic() + 20
    while True:
        found = [line for path in folder.glob("audit/*.jsonl") for line in path.read_text().splitlines()]
        if len(found) >= count:
            return [json.loads(line) for line in found]
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_every_request_is_one_line_with_who_what_and_how_long(serve_free, tmp_path: Path) -> None:
    entry, secret = new_key(tmp_path / "keys.yaml", "alice", expires=None, scopes=("chat",))
    free = serve_free(keys=KeyRing(file=tmp_path / "keys.yaml"))

    answer = post(free.url, secret, creativity=0.25)
    stream = post(free.url, secret, stream=True, user="somebody else", verify=True)
    others = [post(free.url, "sk-wrong"), post(free.url, secret, temperature=9)]
    others.append(HTTP.get(f"{free.url}/no/such/place?token=1"))

    by_id = {line["request_id"]: line for line in lines(free.folder, 5)}
    one, two, wrong, invalid, nowhere = (by_id[sent.headers["x-request-id"]] for sent in (answer, stream, *others))
    assert one["key"] == entry.id
    assert (one["route"], one["status"], one["dial"]) == ("/v1/chat/completions", 200, 0.25)
    usage = answer.json()["usage"]
    assert (one["prompt_tokens"], one["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 < one["first_token_ms"] <= one["ms"] and one["verdict"] == "unverified"
    assert stream.status_code == two["status"] == 200 and two["completion_tokens"] == 4
    assert len(one["user"]) == 16 and one["user"] != two["user"], "of the key's user, and of the body's"
    assert (wrong["status"], wrong["code"], wrong["key"]) == (401, "invalid_api_key", None)
    assert (invalid["status"], invalid["code"]) == (400, "invalid_value")
    assert (nowhere["route"], nowhere["status"]) == ("other", 404)


def test_a_client_that_leaves_is_a_499_with_the_tokens_it_cost(serve_free) -> None:
    free = serve_free(hold=True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{free.url}/v1/chat/completions", json=BODY, timeout=0.3)

    (line,) = lines(free.folder, 1)

    assert line["status"] == 499 and line["prompt_tokens"] > 0 and line["completion_tokens"] == 0


def test_no_key_and_no_text_is_in_any_log(serve_free, tmp_path: Path, caplog, capfd) -> None:
    _, secret = new_key(tmp_path / "keys.yaml", "alice", expires=None, scopes=("chat", "admin"))
    free = serve_free(keys=KeyRing(file=tmp_path / "keys.yaml"), access={"traces": "file"})

    with caplog.at_level(logging.DEBUG):
        post(free.url, secret, user="alice@example.org")
        post(free.url, secret, stream=True, timeline=True)
        post(free.url, secret + "x")
        post(free.url, secret, stop=SECRET_TEXT * 100)
        post(free.url, secret, headers={"idempotency-key": SECRET_TEXT})
        free.decoder.bug = RuntimeError(f"cannot decode {SECRET_TEXT} for {secret}")
        broken = post(free.url, secret)
        again = post(free.url, secret, headers={"idempotency-key": "other"})
        metrics = HTTP.get(f"{free.url}/metrics").text
    lines(free.folder, 8)
    free.close()

    assert broken.status_code == again.status_code == 500 and "4711" not in broken.text
    kept = [path.read_text(errors="replace") for path in free.folder.rglob("*") if path.is_file()]
    said = [record.getMessage() + str(record.exc_info or "") for record in caplog.records if "httpx" not in record.name]
    captured = capfd.readouterr()
    everything = "\n".join([*kept, *said, captured.out, captured.err, metrics])
    assert "RuntimeError at" in everything and '"prefill"' in everything, "it is logged, and traced"
    for private in (SECRET_TEXT, "4711", secret, secret.rpartition("-")[2], "alice"):
        assert private not in everything


def test_a_hostile_name_stays_on_its_line() -> None:
    visit = Visit("id\n{}", 'a"\r\n\u2028b', lambda visit: None, user='x\n{"status": 200}')

    line = line_of(visit)

    assert len(line.splitlines()) == 1 and json.loads(line)["user"] == visit.user


def test_the_audit_file_is_private_and_takes_a_bounded_part_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "a.jsonl"
    for number in range(100):
        append(path, f"{number:0>99}\n", max_bytes=1_000, keep=2)

    sizes = [file.stat().st_size for file in path.parent.iterdir()]

    assert len(sizes) == 3 and max(sizes) <= 1_000
    assert path.read_text().splitlines()[-1].endswith("99")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pseudonym_is_the_same_in_every_replica_of_a_run_and_in_no_other(tmp_path: Path) -> None:
    here, again = (Audit(AuditSpec(), tmp_path / "run").pseudonym("alice") for _ in range(2))

    assert here == again != Audit(AuditSpec(), tmp_path / "other").pseudonym("alice")
    assert (tmp_path / "run/audit/pepper").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_gone_costs_lines_and_nothing_else(tmp_path: Path, caplog) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    audit = Audit(AuditSpec(), tmp_path / "run")

    audit.write(Visit("1", "/", lambda visit: None, key=Key("k", "u")))
    audit.close()

    assert audit.dropped == 1 and "1 audit lines are lost" in caplog.text


def test_metrics_are_open_on_loopback_and_otherwise_for_admins(serve_free, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    _, talker = new_key(path, "a", expires=None, scopes=("chat",))
    _, admin = new_key(path, "b", expires=None, scopes=("admin",))
    free = serve_free(keys=KeyRing(file=path))
    post(free.url, talker)
    post(free.url, talker, temperature=9)
    lines(free.folder, 2)

    def status(key: str, **headers: str) -> int:
        named = {"authorization": f"Bearer {key}"} | headers
        return HTTP.get(f"{free.url}/metrics", headers=named).status_code

    text = HTTP.get(f"{free.url}/metrics").text
    assert 'tiger_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'tiger_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'tiger_tokens_total{kind="completion"} 4.0' in text and "tiger_slots_used 0" in text
    for name in ("time_to_first_token_seconds", "time_per_token_seconds", "w", "request_seconds"):
        assert f"tiger_{name}_bucket" in text
    assert "tiger_steps_total" in text and "tiger_queued" in text and "tiger_outstanding_tokens" in text
    proxied = {"x-forwarded-for": "203.0.113.7"}
    assert (status(talker, **proxied), status("wrong", **proxied), status(admin, **proxied)) == (403, 401, 200)


def test_an_open_server_behind_a_proxy_keeps_its_metrics(serve_free) -> None:
    free = serve_free()

    assert HTTP.get(f"{free.url}/metrics").status_code == 200
    assert HTTP.get(f"{free.url}/metrics", headers={"forwarded": "for=203.0.113.7"}).status_code == 403


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeline_is_given_when_it_is_asked_for(serve_free, stream: bool) -> None:
    free = serve_free()

    text = post(free.url, stream=stream, timeline=True).text

    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [json.loads(text)]
    timeline = next(chunk["ensemble"]["timeline"] for chunk in chunks if "timeline" in chunk.get("ensemble", {}))
    assert [mark["event"] for mark in timeline] == ["admitted", "first_token", "finished"]
    assert sorted(mark["ms"] for mark in timeline) == [mark["ms"] for mark in timeline]
    assert "timeline" not in post(free.url, stream=stream).text


def test_a_held_answer_tells_its_phases_to_timeline_and_spans(serve_engine, heads) -> None:
    served = serve_engine(heads=str(heads(p_dev=3.0)))

    ensemble = post(served.url, verify=True, timeline=True).json()["ensemble"]

    events = [mark["event"] for mark in ensemble["timeline"]]
    assert events == ["admitted", "draft", "judge", "rewrite", "first_token", "finished"]
    served.settle()
    text = HTTP.get(f"{served.url}/metrics").text
    assert "tiger_rewrites_total 1.0" in text and f'tiger_verdicts_total{{verdict="{ensemble["verdict"]}"}} 1.0' in text


def test_spans_are_part_of_the_callers_trace_and_follow_each_other(serve_free) -> None:
    free = serve_free(access={"traces": "file"})
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    post(free.url, headers={"traceparent": f"00-{trace}-{parent}-01"}, verify=False)
    lines(free.folder, 1)
    free.close()

    text = "".join(path.read_text() for path in free.folder.glob("traces/*.jsonl"))
    spans = [json.loads(line) for line in text.splitlines()]
    names = [span["name"] for span in spans]
    assert names == ["admit", "prefill", "decode", "respond", "/v1/chat/completions"]
    root = spans[-1]
    assert root["context"]["trace_id"] == f"0x{trace}" and root["parent_id"] == f"0x{parent}"
    assert root["attributes"]["gen_ai.usage.output_tokens"] == 4
    for before, after in pairwise(spans[:-1]):
        assert before["end_time"] == after["start_time"] and after["parent_id"] == root["context"]["span_id"]


def test_an_exporter_that_is_not_installed_is_one_line(serve_free, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with pytest.raises(InputError, match="pip install opentelemetry-exporter-otlp-proto-http"):
        serve_free()
