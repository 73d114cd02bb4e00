"""Best validation loss at equal budget: our searchers and schedulers beside random search and the i-Epoch baseline.

A small network learns scikit-learn's digits for up to 27 epochs; every method may spend as many epochs in all as 20 whole
trials take. Ours are a sweep's own course, searcher and scheduler, with two trials at once that take turns epoch by
epoch; Ray and MLflow, which would take longer than the training, are left out. Stock is Optuna's `RandomSampler` with
every trial trained to its end, and i-Epoch (arXiv 2404.04111): random trials of i epochs each, the best one finished.

A seed is the split of the data, the networks' first weights and the search's chance; methods are compared seed by seed.
Intervals are 95 % bootstrap intervals of the median difference, each row by itself; of 5 seeds that is all of them, of
fewer nothing is claimed. `SEEDS=10 python -m benchmarks sweep_quality` takes twice the default.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

from benchmarks.harness import Row, bootstrap
from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.sweep.course import Course, begin_record, scheduler_of
from tigerbot_jobs.sweep.ranking import ranked
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.trials import Trial

SEEDS = int(os.environ.get("SEEDS", "5"))
EPOCHS, WHOLE_TRIALS, AT_ONCE = 27, 20, 2
BUDGET = EPOCHS * WHOLE_TRIALS
SPACE = {
    "lr": {"log_uniform": [1e-3, 1.0]},
    "batch": {"choice": [16, 32, 64]},
    "width": {"log_int": [8, 128]},
    "momentum": {"uniform": [0.0, 0.95]},
    "decay": {"log_uniform": [1e-6, 1e-2]},
}


class Loss(NamedTuple):
    """Of the network that a method ends with: on the data it chose by, and on data that nobody saw."""

    validation: float
    unseen: float


class Network:
    """One trial: a network that is trained an epoch at a time."""

    def __init__(self, params: dict[str, Any], seed: int) -> None:
        import torch
        from torch import nn

        self._train, self._validation, self._unseen = _data(seed)
        torch.manual_seed(seed)
        self._model = nn.Sequential(nn.Linear(64, params["width"]), nn.ReLU(), nn.Linear(params["width"], 10))
        about = {"lr": params["lr"], "momentum": params["momentum"], "weight_decay": params["decay"]}
        self._optimizer = torch.optim.SGD(self._model.parameters(), **about)
        self._batch, self.epoch = params["batch"], 0

    def learn(self, epochs: int = 1) -> float:
        """The validation loss afterwards; infinite once it is no number."""
        import torch
        from torch.nn.functional import cross_entropy

        x, y = self._train
        for _ in range(epochs):
            self.epoch += 1
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.epoch))
            for rows in order.split(self._batch):
                self._optimizer.zero_grad()
                cross_entropy(self._model(x[rows]), y[rows]).backward()
                self._optimizer.step()
        return self._loss_on(self._validation)

    def loss(self) -> Loss:
        return Loss(self._loss_on(self._validation), self._loss_on(self._unseen))

    def _loss_on(self, data: tuple[Any, Any]) -> float:
        import torch

        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(self._model(data[0]), data[1]).item()
        return loss if math.isfinite(loss) else math.inf


@cache
def _data(seed: int) -> list[tuple[Any, Any]]:
    """Pixels and labels to train on, to choose by, and to see nothing of."""
    import torch
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[rows], y[rows]) for rows in order.split([997, 400, 400])]


def ours(searcher: str, scheduler: str, seed: int) -> Loss:
    """A sweep until its epochs are spent; the configuration it would name as the best."""
    whole = scheduler == "none"
    raw = {"kind": "sweep", "name": "quality", "target": "tigerbot_jobs.sweep.example:digits", "space": SPACE}
    raw |= {"searcher": searcher, "scheduler": scheduler, "scheduling": {"grace": 1, "reduction": 3}}
    spec = parse_spec(raw | {"seed": seed, "trials": WHOLE_TRIALS if whole else BUDGET})
    assert isinstance(spec, SweepSpec)
    space = Space(spec.space)
    course = Course(spec, space, searcher_of(spec, space), scheduler_of(spec))
    running: dict[str, Network] = {}
    ends: dict[str, Loss] = {}
    spent = 0
    while spent < BUDGET:
        while len(running) < AT_ONCE and (trial := course.next_trial()) is not None:
            course.apply(begin_record(trial, cards=1.0, node="") | {"t": float(spent)})
            running[trial.name] = Network(trial.params, seed)
        if not running:
            break
        for name in list(running):
            spent += 1
            if _over(course, course.trials[name], running[name], float(spent)):
                ends[name] = running.pop(name).loss()
    best = ranked(course.trials.values(), spec)[0][0]
    return ends[best.name]


def _over(course: Course, trial: Trial, network: Network, now: float) -> bool:
    """One more epoch of a trial, told to the course as a driver does; whether that was its last."""
    value, about = network.learn(), {"name": trial.name, "t": now}
    if math.isfinite(value):
        point = {"step": network.epoch, "value": value, "metrics": {"loss": value}}
        course.apply({"event": "point"} | point | about)
        for rung in due.rungs if (due := course.due.get(trial.name)) else ():
            course.apply({"event": "rung", "rung": rung.rung, "promoted": rung.promoted} | about)
    status = "failed" if not math.isfinite(value) else "stopped" if trial.stop else "done"
    over = status != "done" or network.epoch == EPOCHS
    if over:
        end = {"status": status, "metric": trial.metric, "error": "", "cause": "", "seconds": 0.0}
        course.apply({"event": "end"} | end | about)
    return over


def random_search(seed: int) -> Loss:
    """Optuna's, every trial trained to its end."""
    found = [Network(params, seed) for params in _drawn(WHOLE_TRIALS, seed)]
    return min(found, key=lambda network: network.learn(EPOCHS)).loss()


def i_epoch(i: int, seed: int) -> Loss:
    """Random trials of `i` epochs each, the best of which is finished."""
    count = (BUDGET - EPOCHS + i) // i
    best = min((Network(params, seed) for params in _drawn(count, seed)), key=lambda network: network.learn(i))
    best.learn(EPOCHS - i)
    return best.loss()


def _drawn(count: int, seed: int) -> list[dict[str, Any]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)), []
    for _ in range(count):
        trial = study.ask()
        found.append(
            {
                "lr": trial.suggest_float("lr", *SPACE["lr"]["log_uniform"], log=True),
                "batch": trial.suggest_categorical("batch", SPACE["batch"]["choice"]),
                "width": trial.suggest_int("width", *SPACE["width"]["log_int"], log=True),
                "momentum": trial.suggest_float("momentum", *SPACE["momentum"]["uniform"]),
                "decay": trial.suggest_float("decay", *SPACE["decay"]["log_uniform"], log=True),
            }
        )
    return found


Method = Callable[[int], Loss]
OURS: dict[str, Method] = {
    "ASHA and TPE": partial(ours, "tpe", "asha"),
    "TPE": partial(ours, "tpe", "none"),
    "our random search": partial(ours, "random", "none"),
}
STOCK: dict[str, Method] = {
    "Optuna's random search": random_search,
    "1-Epoch": partial(i_epoch, 1),
    "3-Epoch": partial(i_epoch, 3),
}


def main() -> list[Row]:
    methods = OURS | STOCK
    seeds = range(1, SEEDS + 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_one_thread) as pool:
        waiting = {(name, seed): pool.submit(method, seed) for seed in seeds for name, method in methods.items()}
        found = {name: [waiting[name, seed].result() for seed in seeds] for name in methods}
    return [_row(mine, found[mine], theirs, found[theirs]) for mine in OURS for theirs in STOCK]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _row(mine: str, ours: list[Loss], theirs: str, stock: list[Loss]) -> Row:
    value, low, high = _difference(ours, stock, "validation")
    unseen = "{:.4f} [{:.4f}, {:.4f}]".format(*_difference(ours, stock, "unseen"))
    claim = "better" if high < 0 else "worse" if low > 0 else "interval includes 0"
    if len(ours) < 5:
        claim = "too few seeds"
    return Row(
        measure=f"validation loss at equal budget, {mine} less {theirs}, median over seeds",
        value=value,
        low=low,
        high=high,
        better="lower",
        target="reported",
        rounds=len(ours),
        ours=f"{statistics.median(loss.validation for loss in ours):.4f}",
        stock=f"{statistics.median(loss.validation for loss in stock):.4f}",
        note=f"{claim}; {BUDGET} epochs a method and seed, up to {EPOCHS} a trial; on data nobody chose by: {unseen}",
    )


def _difference(ours: list[Loss], stock: list[Loss], data: str) -> tuple[float, float, float]:
    """Ours less stock: the median over seeds and its interval."""
    found = [getattr(mine, data) - getattr(theirs, data) for mine, theirs in zip(ours, stock, strict=True)]
    return statistics.median(found), *bootstrap(found)


if __name__ == "__main__":
    for row in main():
        print(row)
