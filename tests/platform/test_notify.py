"""The webhook against a real HTTP server: it hears how runs end, and a deaf one stops nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tigerbot import notify, runner
from tigerbot.errors import DataError
from tigerbot.spec import parse_spec


class Hook(HTTPServer):
    """Keeps the JSON of every POST; answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[dict[str, Any]] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook = self.server
        assert isinstance(hook, Hook)
        hook.heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(hook.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("TIGER_WEBHOOK", server.url)
    yield server
    server.shutdown()
    server.server_close()


def corpus(folder: Path, rows: str) -> Any:
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    raw = {"kind": "corpus", "name": "town"}
    raw |= {"sources": [{"name": "s", "path": str(folder / "rows.jsonl")}], "tokenizer": {"vocab_size": 512}}
    return parse_spec(raw | {"sequence_length": 16, "storage": {"uri": str(folder / "runs")}})


def test_it_hears_that_a_run_is_done_and_why_one_failed(hook: Hook, tmp_path: Path) -> None:
    runner.run_spec(corpus(tmp_path, '{"text": "老虎在山里走。"}\n'))
    with pytest.raises(DataError):
        runner.run_spec(corpus(tmp_path, ""), replace=True)

    done, failed = hook.heard
    assert (done["event"], done["run"], done["kind"]) == ("done", "town", "corpus")
    assert failed["event"] == "failed" and "is empty" in failed["detail"] and "is empty" in failed["text"]


def test_ctrl_c_is_told_too(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "job_function", lambda kind: interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_spec(corpus(tmp_path, '{"text": "a"}\n'))

    assert [heard["event"] for heard in hook.heard] == ["stopped"]


def test_a_webhook_that_refuses_is_tried_twice_and_its_token_is_not_shown(
    hook: Hook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook.status = 500

    assert not notify.notify("done", corpus(tmp_path, ""))

    assert len(hook.heard) == 2
    said = capsys.readouterr().err
    assert "HTTP 500" in said and "secret" not in said


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "not an address", "ftp://x"])
def test_one_that_is_not_there_stops_nothing(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGER_WEBHOOK", address)

    assert not notify.notify("done", corpus(tmp_path, ""))


def test_robots_of_chinese_messengers_get_their_own_shape() -> None:
    facts = {"event": "failed", "run": "r", "kind": "train", "host": "h", "detail": "磁盘已满"}

    assert notify._message("https://open.feishu.cn/x", facts)["content"]["text"] == "train r: failed (磁盘已满)"
    assert notify._message("https://oapi.dingtalk.com/x", facts)["msgtype"] == "text"
    assert notify._message("https://hooks.slack.com/x", facts)["text"].startswith("train r: failed")
