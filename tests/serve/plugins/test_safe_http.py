"""The client that plug-ins fetch with goes where the spec says and nowhere else, and does not wait for ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tigerbot.spec.plugins import SearchPlugin
from tigerbot_serve.ensemble.evidence import Inquiry
from tigerbot_serve.plugins.safe_http import Refused, SafeClient
from tigerbot_serve.plugins.search import Search

SEEN: list[tuple[str, dict[str, str]]] = []


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        SEEN.append((self.path, dict(self.headers)))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.send_header("set-cookie", "a=b")
            self.end_headers()
            return
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()
        if self.path == "/large":
            self.wfile.write(b"[" + b"1," * 1_000_000)
        elif self.path == "/drip":
            for _ in range(200):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/page":
            self.wfile.write(b"<html>")
        else:
            rows = [{"title": "T", "snippet": "Pine Street", "url": "https://a/1"}, {"text": 3}, {"text": "two"}, 5]
            self.wfile.write(json.dumps({"results": rows}).encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def site() -> Iterator[int]:
    SEEN.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join(10)


def client(port: int = 80, *, at: str = "127.0.0.1", **fields) -> SafeClient:
    wanted = {"schemes": ("http", "https"), "networks": ["127.0.0.1"], "ports": [port], "resolver": lambda *_: [at]}
    return SafeClient(["wiki.test"], **(wanted | fields))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.8",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    with pytest.raises(Refused, match="not public"):
        client(at=address, networks=()).checked_address("https://wiki.test/")


def test_one_bad_address_among_good_ones_is_enough() -> None:
    mixed = client(networks=(), resolver=lambda *_: ["93.184.215.14", "10.0.0.1"])

    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        mixed.checked_address("https://wiki.test/")


@pytest.mark.parametrize(
    "url",
    [
        "https://other.test/",
        "https://wiki.test.evil.com/",
        "https://wiki.test@evil.com/",
        "https://user:pass@wiki.test/",
        "file:///etc/passwd",
        "ftp://wiki.test/",
        "https://wiki.test:22/",
        "https://127.0.0.1/",
        "http://2130706433/",
        "https://[::1]/",
        "https://wiki.test:99999/",
        "//wiki.test/",
        "https://",
    ],
)
def test_what_is_not_on_the_list_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        client(at="93.184.215.14").checked_address(url)


def test_the_connection_is_made_to_the_address_that_was_looked_at(site: int, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:1")
    asked = []

    found = client(site, resolver=lambda *name: asked.append(name) or ["127.0.0.1"]).get_json(
        f"http://wiki.test:{site}/search?q=1"
    )

    assert found["results"] and len(asked) == 1
    path, headers = SEEN[0]
    assert path == "/search?q=1" and headers["Host"] == f"wiki.test:{site}"
    assert not {"Authorization", "Cookie"} & set(headers)


def test_every_redirect_is_looked_at_again(site: int) -> None:
    here = f"http://wiki.test:{site}"

    assert client(site).get_json(f"{here}/to/{here}/ok")["results"]
    assert all("Cookie" not in headers for _, headers in SEEN)
    with pytest.raises(Refused, match="not on the list"):
        client(site).get_json(f"{here}/to/http://169.254.169.254/latest")
    with pytest.raises(Refused, match="redirects more than 3"):
        client(site).get_json(f"{here}/to/" + f"{here}/to/" * 5 + f"{here}/ok")


@pytest.mark.parametrize(
    ("path", "message"),
    [("/large", "larger than"), ("/page", "not JSON"), ("/broken", "answered 500"), ("/drip", "too long")],
)
def test_answers_are_bounded(site: int, path: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        client(site).get_json(f"http://wiki.test:{site}{path}", timeout_s=0.5 if path == "/drip" else 30)


def test_the_search_endpoint_gives_evidence_and_what_is_no_text_is_left_out(site: int) -> None:
    spec = SearchPlugin(
        name="search",
        url=f"http://localhost:{site}/?q={{query}}",
        schemes=["http"],
        allow_addresses=["127.0.0.0/8", "::1"],
        deadline_s=20,
    )

    found = Search(spec).look_up(Inquiry("where & what?", ""))

    assert [(one.text, one.url) for one in found] == [("Pine Street", "https://a/1"), ("two", "")]
    assert SEEN[0][0] == "/?q=where%20%26%20what%3F"


def test_an_endpoint_inside_the_house_is_not_asked_unless_the_spec_allows_it(site: int) -> None:
    spec = SearchPlugin(name="search", url=f"http://localhost:{site}/?q={{query}}", schemes=["http"])

    with pytest.raises(Refused, match="not public"):
        Search(spec).look_up(Inquiry("where?", ""))
    assert not SEEN
