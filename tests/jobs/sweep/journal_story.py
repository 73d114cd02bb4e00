"""Journals of sweeps that never ran, as their drivers would have written them: random, ASHA, PBT, faults, seeds."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

STEPS = 20


class JournalStory:
    """Writes a journal, event by event. Time passes as trials do: `slots` of them at once.

    The loss of a configuration is a bowl in log lr and width; every report has noise of `sigma` on it.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        trials: int = 40,
        searcher: str = "random",
        scheduler: str = "none",
        mode: str = "min",
        price: float | None = 2.0,
        sigma: float = 0.05,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.trials, self.mode, self.sigma = trials, mode, sigma
        self._about = {"searcher": searcher, "scheduler": scheduler, "price_per_card_hour": price}
        self._random, self._slots = random.Random(seed), [1.7e9] * 4
        self.open()

    def open(self, driver: str = "0badcafe") -> JournalStory:
        return self._say(
            "open", min(self._slots), driver=driver, trials=self.trials, metric="loss", mode=self.mode, **self._about
        )

    def params(self) -> dict[str, Any]:
        lr, width = 10 ** self._random.uniform(-4, -1), self._random.choice([64, 128, 256])
        return {
            "lr": lr,
            "width": width,
            "dropout": self._random.uniform(0, 0.5),
            "act": self._random.choice(["relu", "silu"]),
        }

    def loss(self, params: dict[str, Any], step: int) -> float:
        true = 2 + (math.log10(params["lr"]) + 2.5) ** 2 + 0.3 * math.log2(256 / params["width"])
        noisy = true + 4 * math.exp(-step / 6) + self._random.gauss(0, self.sigma)
        return noisy if self.mode == "min" else -noisy

    def trial(
        self,
        index: int,
        params: dict[str, Any] | None = None,
        *,
        config: int | None = None,
        seed: int = 1,
        fresh: bool = False,
        steps: int = STEPS,
        status: str = "done",
        cause: str = "",
        error: str = "",
    ) -> JournalStory:
        """A whole trial."""
        slot = min(range(len(self._slots)), key=lambda at: self._slots[at])
        began, params = self._slots[slot], params or self.params()
        name, value = f"trial-{index:04d}", math.nan
        self.begin(name, params, config=f"c{index if config is None else config:04d}", seed=seed, t=began, fresh=fresh)
        for step in range(1, steps + 1):
            value = self.loss(params, step)
            speed = 2e5 / params["width"] * self._random.uniform(0.9, 1.1)
            self.point(name, step, value, began + 3 * step, speed=speed)
        self._slots[slot] = began + 3 * steps + 0.5
        failed = status in ("failed", "killed")
        metric = None if failed else value
        return self.end(name, status, metric, seconds=3.0 * steps, cause=cause, error=error, t=self._slots[slot])

    def random_search(self, count: int) -> JournalStory:
        for index in range(count):
            self.trial(index)
        return self

    def asha(self, count: int) -> JournalStory:
        """Rungs at 2, 6 and 18 of 20 steps; a third goes on."""
        seen: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for index in range(count):
            params, name = self.params(), f"trial-{index:04d}"
            until, status, passed = STEPS, "done", []
            for rung, at in enumerate((2, 6, 18)):
                value = self.loss(params, at)
                seen[rung].append(value)
                promoted = value <= sorted(seen[rung])[(len(seen[rung]) - 1) // 3]
                passed.append((rung, at, value, promoted))
                if not promoted:
                    until, status = at, "stopped"
                    break
            self.trial(index, params, steps=until, status=status)
            for rung, at, value, promoted in passed:
                self.rung(name, rung, at, value, promoted)
        return self

    def pbt(self, members: int = 8, generations: int = 6) -> JournalStory:
        population = [self.params() for _ in range(members)]
        for index, params in enumerate(population):
            self.begin(f"trial-{index:04d}", params, config=f"c{index:04d}", seed=1, t=1.7e9)
        step, clock = 0, 1.7e9
        for _ in range(generations):
            step, clock = step + 5, clock + 10
            losses = [self.loss(params, step) for params in population]
            for index, loss in enumerate(losses):
                self.point(f"trial-{index:04d}", step, loss, clock + index * 0.01)
            order = sorted(range(members), key=lambda at: losses[at])
            for worst, best in ((order[-1], order[0]), (order[-2], order[1])):
                before, factor = population[worst], self._random.choice([0.8, 1.2])
                population[worst] = population[best] | {"lr": population[best]["lr"] * factor}
                names = f"trial-{worst:04d}", f"trial-{best:04d}"
                change = {"before": before, "after": population[worst]}
                self._say("exploit", clock + 1, name=names[0], **{"from": names[1]}, step=step, **change)
        for index, params in enumerate(population):
            self.end(f"trial-{index:04d}", "done", self.loss(params, step), seconds=60, t=clock + 2)
        return self

    def fresh_seeds(self, best: int = 5, seeds: int = 5) -> JournalStory:
        """The best configurations once more with seeds of their own, as a sweep ends."""
        ended = {e["name"]: e["metric"] for e in self.events if e["event"] == "end" and e["metric"] is not None}
        begun = {e["name"]: e for e in self.events if e["event"] == "begin"}
        order = sorted(ended, key=lambda name: ended[name], reverse=self.mode == "max")[:best]
        at = len(begun)
        for name in order:
            for seed in range(2, 2 + seeds):
                self.trial(at, begun[name]["params"], config=int(begun[name]["config"][1:]), seed=seed, fresh=True)
                at += 1
        return self

    def begin(
        self, name: str, params: dict[str, Any], *, config: str, seed: int, t: float, attempt: int = 1, **more: Any
    ) -> JournalStory:
        about = {"fresh": False, "parent": None, "attempt": attempt, "cards": 1.0, "node": "n1"} | more
        return self._say("begin", t, name=name, params=params, config=config, seed=seed, **about)

    def point(self, name: str, step: int, value: float, t: float, *, speed: float = 1000.0) -> JournalStory:
        metrics = {"loss": value, "tokens_per_s": speed}
        return self._say("point", t, name=name, step=step, value=value, metrics=metrics)

    def end(
        self,
        name: str,
        status: str,
        metric: float | None,
        *,
        seconds: float,
        t: float,
        cause: str = "",
        error: str = "",
    ) -> JournalStory:
        return self._say("end", t, name=name, status=status, metric=metric, error=error, cause=cause, seconds=seconds)

    def rung(self, name: str, rung: int, step: int, value: float, promoted: bool) -> JournalStory:
        return self._say("rung", self._slots[0], name=name, rung=rung, step=step, value=value, promoted=promoted)

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in self.events)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def _say(self, kind: str, t: float, /, **fields: Any) -> JournalStory:
        self.events.append({"event": kind} | fields | {"t": t})
        return self
