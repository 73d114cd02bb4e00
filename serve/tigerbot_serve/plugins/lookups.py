"""Asks plug-ins off the event loop and off the engine's thread, each within its deadline and all within a budget.

A thread cannot be ended from outside: one that hangs keeps its place among its plug-in's few, and when all of these
hang the plug-in is not asked again until one comes back. Whatever fails costs its own evidence and a reason, no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tigerbot.errors import first_line
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry
from tigerbot_serve.plugins.registry import Plugin

log = logging.getLogger(__name__)

AT_ONCE = 8  # calls of one plug-in
MAX_EVIDENCE, MAX_CHARACTERS = 8, 600


@dataclass
class Lookup:
    """Questions under way. `done` turns true once; then `found` and `reasons` stay as they are."""

    done: bool = False
    found: tuple[Evidence, ...] = ()
    reasons: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass
class _Call:
    ended: threading.Event = field(default_factory=threading.Event)
    found: Sequence[Evidence] = ()
    failure: str = ""


class Lookups:
    """The server's plug-ins, to be asked by name."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self._plugins = dict(plugins)
        self._places = {name: threading.Semaphore(AT_ONCE) for name in plugins}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._plugins)

    def start(self, names: Sequence[str], inquiry: Inquiry, budget_s: float, done: Callable[[], None]) -> Lookup:
        """Ask plug-ins; `done` is called from another thread once, at the latest when the budget is used up."""
        lookup = Lookup()
        threading.Thread(
            target=self._gather, args=(names, inquiry, budget_s, lookup, done), name="tiger-lookup", daemon=True
        ).start()
        return lookup

    def _gather(
        self, names: Sequence[str], inquiry: Inquiry, budget_s: float, lookup: Lookup, done: Callable[[], None]
    ) -> None:
        began = time.monotonic()
        try:
            calls = {name: self._call(name, inquiry) for name in names if name in self._plugins}
            found: list[Evidence] = []
            reasons: list[str] = []
            for name, call in calls.items():
                allowed_s = min(self._plugins[name].deadline_s, budget_s)
                if not call.ended.wait(max(0.0, began + allowed_s - time.monotonic())):
                    reasons.append(f"{name}: no answer within {allowed_s:g} s")
                elif call.failure:
                    reasons.append(f"{name}: {call.failure}")
                else:
                    found += call.found
            lookup.found = tuple(_cut(one) for one in found[:MAX_EVIDENCE])
            lookup.reasons = tuple(reasons)
        except Exception as error:
            log.exception("looking up failed")
            lookup.reasons = (f"looking up failed ({type(error).__name__})",)
        finally:
            lookup.took_s = time.monotonic() - began
            lookup.done = True
            done()

    def _call(self, name: str, inquiry: Inquiry) -> _Call:
        call, place = _Call(), self._places[name]
        if not place.acquire(blocking=False):
            call.failure = f"{AT_ONCE} calls hang already"
            call.ended.set()
            return call

        def run() -> None:
            try:
                call.found = list(self._plugins[name].look_up(inquiry))
            except Exception as error:
                # Its words stay in the log: they may name addresses that are no client's business.
                log.warning("plug-in %s failed: %s", name, first_line(error))
                call.failure = "failed"
            finally:
                place.release()
                call.ended.set()

        threading.Thread(target=run, name=f"tiger-{name}", daemon=True).start()
        return call


def _cut(one: Evidence) -> Evidence:
    text = one.text[:MAX_CHARACTERS]
    return replace(one, text=text, end=min(one.end, one.start + len(text)))
