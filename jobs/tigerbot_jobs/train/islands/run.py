"""A training run of several islands: the outer server, one `tiger run` an island, and the model they end with.

The islands' runs lie in `<run>/islands/`. One that ends badly is started again and joins the others; one that has
spent its failures is given up, and the others train on without it. The global weights become the run's model.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from tigerbot.errors import InputError, SpecError, TigerError
from tigerbot.models import load_tokenizer, save_model
from tigerbot.progress import Stage, stage
from tigerbot.runs import Run, local_root, read_json, write_json, write_text
from tigerbot.spec import Islands, TrainSpec, parse_spec
from tigerbot.storage import open_store
from tigerbot.tracking import tracked
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.islands.children import Child, last_line, spawn, why
from tigerbot_jobs.train.islands.server import SECRET
from tigerbot_jobs.train.islands.state import load_state
from tigerbot_jobs.train.islands.sync import SERVER
from tigerbot_jobs.train.metrics import Follower, Row, append_row, read_rows
from tigerbot_jobs.train.model import LanguageModel, base_folder, make_model, tokenizer_folder

_POLL_S = 0.3


def run_islands(run: Run, job: WorkerJob) -> dict[str, Any]:
    """Train all islands to their end.

    Raises:
        TigerError: an island's input is wrong, or none came to its end.
    """
    with tracked(run, job.data_tags) as (_, its_run):
        with _Fleet(run, job, lambda row: its_run.log(_values(row), step=int(row["step"]))) as fleet:
            fleet.follow()
        result = _finish(run, job, fleet)
        if job.spec.register_as:
            its_run.register(job.spec.register_as, run.folder / "model")
    return run.finish(result)


@dataclass
class _Fleet:
    """The server and the islands of one run, as long as the `with` lasts."""

    run: Run
    job: WorkerJob
    on_row: Callable[[Row], None]
    islands: dict[int, Child] = field(default_factory=dict)
    _shown: Stage | None = None

    def __enter__(self) -> _Fleet:
        spec, islands = self.job.spec, _islands(self.job.spec)
        self._folder = self.run.folder / "islands"
        self._folder.mkdir(exist_ok=True)
        self._secret = _secret(spec)
        self._listen = islands.server or "127.0.0.1:0"
        self._server = Child("the outer server", self._start_server)
        self._rows: dict[int, Row] = {}
        self._taking = threading.Lock()
        self._said = read_rows(self.run.folder / "metrics.jsonl")[-1:]
        self._rounds_read, self._left = 0, set()
        here = range(islands.count) if islands.here is None else islands.here
        self.specs = {island: derived(self.job, island, len(here)) for island in here}
        self.islands = {island: Child(one.name, lambda i=island: self._start(i)) for island, one in self.specs.items()}
        self._followers = [
            Follower(_made(folder_of(one)) / "metrics.jsonl", lambda row, i=island: self._take(i, row))
            for island, one in self.specs.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.islands.values():
            if child.process is not None:
                child.process.terminate()  # all at once: each keeps its state first
        for child in (*self.islands.values(), self._server):
            child.stop()
        for follower in self._followers:
            follower.close()

    def follow(self) -> None:
        """Until every island of this command has ended or is given up, and those elsewhere have ended."""
        spec = self.job.spec
        with stage(
            f"training {spec.name} on {_islands(spec).count} islands", total=spec.train.tokens, unit="tokens"
        ) as s:
            self._shown = s
            self._server.poll()
            self._wait_for_server()
            while any(not child.over for child in self.islands.values()) or not self._others_are_done():
                if self._server.poll() is not None:
                    print("  the outer server ended; it is started again where it was", flush=True)
                for island, child in self.islands.items():
                    self._look_after(island, child)
                self._say_rounds()
                time.sleep(_POLL_S)

    def _look_after(self, island: int, child: Child) -> None:
        status = child.poll()
        if status is None:
            return
        if status == 0:
            child.over = "done"
        elif status == 2:
            raise InputError(last_line(self._log(island)), where=child.name, fix=f"see {self._log(island)}")
        elif 0 <= self.job.spec.fault_tolerance.max_failures < child.failures:
            child.over = "given up"
            print(f"  {child.name} failed {child.failures} times and is given up: {last_line(self._log(island))}")
        else:
            print(f"  {child.name} ended ({why(status)}); it is started again and joins the others", flush=True)

    def _others_are_done(self) -> bool:
        return len(self._left | set(self.islands)) >= _islands(self.job.spec).count

    def _start_server(self) -> subprocess.Popen[bytes]:
        islands = _islands(self.job.spec)
        settings = {
            "count": islands.count,
            "lr": islands.outer_lr,
            "momentum": islands.outer_momentum,
            "quantize": islands.quantize == "int8",
            "deadline_s": None if islands.deadline_s == "auto" else islands.deadline_s,
        }
        words = ["tigerbot_jobs.train.islands.server", str(self._folder), self._listen, json.dumps(settings)]
        return spawn(words, self._folder / "server.log", {SECRET: self._secret})

    def _wait_for_server(self) -> None:
        """Learn where it listens: from then on it is started again at the same place."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self._server.process is not None:
            card = read_json(self._folder / "server.json", {})
            if card.get("pid") == self._server.process.pid:
                self._listen = f"{card['host']}:{card['port']}"
                return
            if self._server.process.poll() is not None:
                break
            time.sleep(0.05)
        log = self._folder / "server.log"
        raise TigerError(f"the outer server did not start ({last_line(log)})", where=self._listen, fix=f"see {log}")

    def _start(self, island: int) -> subprocess.Popen[bytes]:
        path = self._folder / f"island-{island}.yaml"
        write_text(path, yaml.safe_dump(self.specs[island].model_dump(mode="json"), allow_unicode=True))
        words = ["tigerbot.cli", "run", str(path)]
        return spawn(words, self._log(island), {SERVER: self._listen, SECRET: self._secret})

    def _log(self, island: int) -> Path:
        return self._folder / f"island-{island}.log"

    def _take(self, island: int, row: Row) -> None:
        """A row of an island, from its follower's thread; the run's own rows are of steps that all here have made."""
        with self._taking:
            self._rows[island] = row
            self._add_up()

    def _add_up(self) -> None:
        rows = list(self._rows.values())
        step = min(row["step"] for row in rows)
        tokens = sum(row["tokens"] for row in rows)
        whole: Row = {"step": step, "tokens": tokens, "loss": sum(row["loss"] for row in rows) / len(rows)}
        whole["tokens_per_second"] = sum(row["tokens_per_second"] for row in rows)
        if all("validation_loss" in row for row in rows):
            whole["validation_loss"] = sum(row["validation_loss"] for row in rows) / len(rows)
        if self._shown is not None:
            self._shown.update(tokens, f"loss {whole['loss']:.3f}, {whole['tokens_per_second']:,.0f} tokens/s")
        if len(rows) == len(self.islands) and (not self._said or step > self._said[-1]["step"]):
            self._said = [whole]
            append_row(self.run.folder / "metrics.jsonl", whole)
            self.on_row(whole)

    def _say_rounds(self) -> None:
        """Say who was missing in the rounds that have closed since the last look."""
        path = self._folder / "rounds.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines[self._rounds_read :]:
            if not line.endswith("\n"):
                return
            self._rounds_read += 1
            row = json.loads(line)
            if "left" in row:
                self._left.add(row["left"])
            elif row["missed"] or row["refused"]:
                print(f"  round {row['round']} closed without islands {row['missed'] + row['refused']}", flush=True)


def derived(job: WorkerJob, island: int, here: int) -> TrainSpec:
    """The spec of one island; `here` islands share this machine.

    Raises:
        SpecError: the name is too long for an island's.
    """
    spec = job.spec
    raw = spec.model_dump(mode="json")
    threads = spec.scale.threads_per_worker or max(1, (os.cpu_count() or 1) // (spec.scale.bounds[1] * here))
    weights = [weight for _, weight in job.train]
    raw |= {"name": f"{spec.name}.island-{island}", "register_as": None}
    raw["islands"] |= {"member": island, "here": None, "server": None}
    raw["storage"]["uri"] = f"{spec.storage.uri.rstrip('/')}/{spec.name}/islands"
    raw["scale"]["threads_per_worker"] = threads
    raw["data"]["train"] = [{"path": str(path), "weight": w} for (path, _), w in zip(job.train, weights, strict=True)]
    raw["data"]["validation"] = [{"path": str(path)} for path in job.validation]
    found = parse_spec(raw, where=spec.name)
    assert isinstance(found, TrainSpec)
    return found


def folder_of(spec: TrainSpec) -> Path:
    return local_root(spec) / spec.name


def _finish(run: Run, job: WorkerJob, fleet: _Fleet) -> dict[str, Any]:
    """The global weights as the run's model, and its numbers."""
    ended = [island for island, child in fleet.islands.items() if child.over == "done"]
    state = load_state(run.folder / "islands")
    if state is None or not ended:
        raise TigerError("no island came to its end", where=str(run.folder), fix="see islands/island-*.log there")
    model = make_model(job.spec)
    with torch.no_grad():
        for name, parameter in LanguageModel(model, None).named_parameters():
            if name in state.layout.sizes:
                parameter.copy_(torch.from_numpy(state.parameter(name)).view_as(parameter))
    tokenizer = load_tokenizer(tokenizer_folder(job.spec.model))
    save_model(model, tokenizer, run.folder / "model", base=base_folder(job.spec))
    if job.spec.storage.uri.startswith("s3://"):
        open_store(job.spec.storage.uri).commit_folder(run.folder / "model", f"{job.spec.name}/model")
    results = [read_json(folder_of(fleet.specs[island]) / "state.json", {})["result"] for island in ended]
    trained = {"steps": max(one["steps"] for one in results), "tokens": sum(one["tokens"] for one in results)}
    write_json(run.folder / "trained.json", trained)
    # The one that ended last has the final weights, and has validated them.
    last = max(ended, key=lambda island: state.island(island).adopted_round)
    return trained | {
        "model": str((run.folder / "model").absolute()),
        "loss": sum(one["loss"] for one in results) / len(results),
        "validation_loss": results[ended.index(last)]["validation_loss"],
        "tokens_per_second": sum(one["tokens_per_second"] for one in results),
        "rounds": state.round,
        "dropped_steps": sum(record.dropped_steps for record in state.islands.values()),
        "given_up": [island for island, child in fleet.islands.items() if child.over == "given up"],
    }


def _islands(spec: TrainSpec) -> Islands:
    assert spec.islands is not None
    return spec.islands


def _secret(spec: TrainSpec) -> str:
    """The shared secret; one of this run's own where nobody else needs it."""
    given, server = os.environ.get(SECRET), _islands(spec).server
    if given or server is None:
        return given or secrets.token_hex(16)
    raise SpecError("islands elsewhere need the same secret", where="islands.server", fix=f"set {SECRET}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _values(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
