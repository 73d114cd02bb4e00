"""A running training job for Prometheus: `/metrics` in its text format, from a thread of the driver.

It only reads: whoever asks gets the account of the run as the driver's callable gives it, no more often than is cheap. It
listens on this machine alone unless another host is given, since what a run is called and how it fares is nobody else's.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tigerbot.errors import InputError
from tigerbot_jobs.train.goodput import Account, percentile

_FRESH_S = 2.0  # two scrapers a few seconds apart cost one account
_COST_SHARE = 0.02  # of one core may go into accounts: those of a run of months take seconds
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Live:
    """What a run is worth right now. NaN for what is not known yet."""

    account: Account
    step: int
    loss: float = math.nan
    tokens_per_s: float = math.nan


class Exporter:
    """Serves `/metrics` until it is closed.

    Args:
        read: gives the run as it is; called from a thread of the exporter, never twice at once.
        port: 0 takes a free one, which `url` names.

    Raises:
        InputError: the address cannot be had.
    """

    def __init__(self, read: Callable[[], Live], *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._text, self._stale_at = "", 0.0
        try:
            self._server = _Server((host, port), _handler(self._metrics))
        except OSError as error:
            raise InputError(
                f"cannot listen there ({error.strerror})", where=f"{host}:{port}", fix="give a port that is free, or 0"
            ) from None
        self.url = f"http://{host}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True, name="exporter")
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metrics(self) -> str:
        with self._lock:
            began = time.monotonic()
            if began >= self._stale_at:
                self._text = "".join(f"{line}\n" for line in metrics_text(self._read()))
                took = time.monotonic() - began
                self._stale_at = began + took + max(_FRESH_S, took / _COST_SHARE)
            return self._text


def metrics_text(live: Live) -> Iterator[str]:
    """The lines of the text format. All are gauges: a rollback takes back steps, and with them seconds."""
    found, run = live.account, _quoted(live.account.name)
    recovery, noticing = found.mttr_s, found.mttd_s
    kinds = Counter(fault.kind for loss in found.losses for fault in loss.incident.faults)
    yield from _gauge("goodput_ratio", "Useful step time over wall time.", run, {"": found.goodput})
    yield from _gauge(
        "goodput_throughput_ratio", "Useful tokens over those of the best rate.", run, {"": found.goodput_throughput}
    )
    by_category = {f'category="{name}"': seconds for name, seconds in found.seconds.items()}
    yield from _gauge("seconds", "Wall time by category.", run, by_category)
    yield from _gauge("wall_seconds", "Wall time since the first event.", run, {"": found.wall_s})
    yield from _gauge("step", "Optimizer steps done.", run, {"": live.step})
    yield from _gauge("loss", "Training loss as last logged.", run, {"": live.loss})
    yield from _gauge("tokens_per_second", "Throughput as last logged.", run, {"": live.tokens_per_s})
    yield from _gauge("useful_tokens", "Tokens in steps that are part of the history.", run, {"": found.tokens})
    yield from _gauge("undone_steps", "Steps made undone by restores and rollbacks.", run, {"": found.undone_steps})
    yield from _gauge("faults", "Faults seen.", run, {f'fault="{_quoted(k)}"': n for k, n in sorted(kinds.items())})
    for name, what, values in (
        ("recovery_seconds", "Fault seen to first new step.", recovery),
        ("noticing_seconds", "Last step to fault seen.", noticing),
    ):
        quantiles = {f'quantile="{q / 100:g}"': percentile(values, q) for q in (50, 90, 99)} if values else {}
        yield from _gauge(name, what, run, quantiles)
    yield from _gauge("card_hours", "Cards held times hours, warm standbys among them.", run, {"": found.card_hours})
    yield from _gauge("cost", "Card-hours times their price.", run, {} if found.cost is None else {"": found.cost})
    yield from _gauge("persisted_bytes", "Bytes written to storage.", run, {"": found.persisted_bytes})


def _gauge(name: str, what: str, run: str, values: dict[str, float]) -> Iterator[str]:
    if values:
        yield f"# HELP tiger_{name} {what}"
        yield f"# TYPE tiger_{name} gauge"
    for label, value in values.items():
        yield f'tiger_{name}{{run="{run}"{"," + label if label else ""}}} {_number(value)}'


def _number(value: float) -> str:
    return str(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _handler(metrics: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # for one who connects and says nothing

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, explain="what is here is /metrics")
                return
            try:
                body = metrics().encode()
            except Exception as error:  # whatever it is, training goes on and the scraper sees a failed target
                self.send_error(500, explain=f"{type(error).__name__}: the account could not be made")
                return
            self.send_response(200)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            """Scrapes are no news."""

    return Handler
