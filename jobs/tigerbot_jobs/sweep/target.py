"""What a trial runs: a train spec with some fields changed, in the trial's own process, or `module:function`.

A target function takes `(params, report)`, calls `report(metrics)` as often as it likes, and returns nothing. What it
`report.keep`s it finds in `report.kept` when its trial begins again. `params["seed"]` differs between the seeds of one
configuration and is the same from one configuration to the next.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tigerbot.errors import SpecError
from tigerbot.spec import SweepSpec, TrainSpec, load_spec, spec_hash
from tigerbot_jobs.sweep.parameters import check_parameters
from tigerbot_jobs.sweep.space import Space, near
from tigerbot_jobs.sweep.worker import Report

Params = Mapping[str, Any]
_ALONG_THE_WAY = (  # what a checkpoint's shapes, data and number of steps do not depend on
    "train.lr",
    "train.schedule",
    "train.warmup_fraction",
    "train.decay_fraction",
    "train.weight_decay",
    "train.betas",
    "train.gradient_clipping",
)
TRAIN_METRICS = ("loss", "validation_loss", "grad_norm", "tokens_per_second", "mfu")


class Target(Protocol):
    hash: str

    def __call__(self, params: Params, report: Report) -> None: ...

    def shrunk(self, params: Params) -> dict[str, Any]:
        """Changes with which the same trial needs less memory; nothing where there are none."""
        ...


def load_target(spec: SweepSpec, space: Space, *, threads: int, folder: Path) -> Target:
    """The target of a sweep; every field of its space has been tried on it.

    Raises:
        SpecError: there is no such file, function, field or metric.
    """
    space.check_names(spec.params | train_fields(spec))
    if spec.target.endswith((".yaml", ".yml")):
        _check_train_target(spec, space)
        _check_population(spec)
        fixed = dict(spec.params)
        if spec.trial == "heavy":
            from tigerbot_jobs.sweep.heavy import HeavyTarget

            interval = spec.scheduling.interval if spec.scheduler == "pbt" else None
            return HeavyTarget(str(Path(spec.target).absolute()), fixed, folder, interval=interval)
        return _TrainTarget(str(Path(spec.target).absolute()), fixed, threads)
    if spec.trial == "heavy":
        raise SpecError("a heavy trial is a train spec", where=f"target {spec.target}", fix="name a YAML file")
    module, _, name = spec.target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        what, fix = f"cannot be imported ({error})", "name a train spec or module:function"
        raise SpecError(what, where=f"target {spec.target}", fix=fix) from None
    check_parameters(function, space, spec.params)
    return _FunctionTarget(spec.target, function, dict(spec.params))


def train_fields(spec: SweepSpec) -> dict[str, Any]:
    """The fields of a train target as the spec has them, for expressions; nothing for a function."""
    if not spec.target.endswith((".yaml", ".yml")):
        return {}
    from tigerbot.spec import flat

    return flat(changed(spec.target, spec.params).model_dump(mode="json"))


def changed(path: str, changes: Params) -> TrainSpec:
    """The train spec of a file with fields changed.

    Raises:
        SpecError: it is none, or a field is wrong.
    """
    spec = load_spec(path, [f"{field}={json.dumps(value)}" for field, value in changes.items()])
    if not isinstance(spec, TrainSpec):
        raise SpecError(f"kind: got {spec.kind}, a sweep wants train", where=path, fix="name a train spec")
    return spec


def seeded(spec: TrainSpec, seed: int) -> TrainSpec:
    """A train spec with one of its configuration's seeds; the first is the spec's own."""
    return spec.model_copy(update={"train": spec.train.model_copy(update={"seed": spec.train.seed + seed})})


def halved(path: str, fixed: Params, params: Params) -> dict[str, Any]:
    """Half the micro batch: the batch stays, so its accumulation doubles."""
    micro = changed(path, {**fixed, **params}).train.micro_batch
    return {"train.micro_batch": micro // 2} if micro > 1 else {}


class _FunctionTarget:
    def __init__(self, name: str, function: Callable[..., None], fixed: dict[str, Any]) -> None:
        self.hash, self._function, self._fixed = name, function, fixed

    def __call__(self, params: Params, report: Report) -> None:
        self._function({"seed": report.seed} | self._fixed | dict(params), report)

    def shrunk(self, params: Params) -> dict[str, Any]:
        """A function that has a `micro_batch` gets half of it, and twice the `accumulation` (1 where it has none)."""
        known = {**self._fixed, **params}
        micro = known.get("micro_batch")
        if not isinstance(micro, int) or micro < 2:
            return {}
        return {"micro_batch": micro // 2, "accumulation": 2 * known.get("accumulation", 1)}


class _TrainTarget:
    """The training loop itself, as the only rank of a process group of one. It keeps its newest checkpoint, as bytes.

    The checkpoint bears no hash of the trial's parameters: in a population another member goes on from it.
    """

    def __init__(self, path: str, fixed: dict[str, Any], threads: int) -> None:
        self._path, self._fixed, self._threads = path, fixed, threads
        self.hash = spec_hash(changed(path, fixed))

    def __call__(self, params: Params, report: Report) -> None:
        import torch
        import torch.distributed as dist

        from tigerbot_jobs.train.alone import train_rank
        from tigerbot_jobs.train.given import WorkerJob

        folder = Path(tempfile.mkdtemp(prefix="trial-"))
        spec = changed(self._path, self._fixed | dict(params) | {"storage.uri": str(folder), "storage.keep": 1})
        spec = seeded(spec, report.seed)
        train = [(Path(source.path).absolute(), source.weight) for source in spec.data.train]
        held_out = [Path(source.path).absolute() for source in spec.data.validation]
        job = WorkerJob(spec, "trial", str(folder / spec.name), train, held_out, self._threads)
        (folder / spec.name).mkdir()
        checkpoints = folder / spec.name / "checkpoints"
        if report.kept is not None:
            unpack(report.kept, checkpoints)
        # A trial's process runs many trials. DeepSpeed remembers the first process group it sees: that one stays.
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=0, world_size=1)
        try:
            train_rank(
                job,
                0,
                1,
                torch.device("cpu"),
                on_row=report,
                keep_model=False,
                on_saved=lambda: report.keep(packed(checkpoints)),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def shrunk(self, params: Params) -> dict[str, Any]:
        return halved(self._path, self._fixed, params)


def packed(folder: Path) -> bytes:
    """A folder as bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add(folder, arcname=".")
    return data.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """A folder from bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")


def _check_train_target(spec: SweepSpec, space: Space) -> None:
    """Try both ends of every field, so that an unknown one is named before anything starts."""
    known = {**spec.params}
    for unit in (0.0, 1.0 - 1e-9):
        tried = changed(spec.target, known | space.at([unit] * len(space.dimensions), known))
    text = [source.path for source in tried.data.train if source.format != "tokens"]
    if text and spec.trial == "light":
        raise SpecError("a trial reads packed tokens only", where=text[0], fix="run a corpus spec and name its shards")
    for metric in (spec.metric, *spec.objectives):
        if metric not in TRAIN_METRICS:
            raise SpecError(f"training reports no {metric}", where="metric", fix=near(metric, TRAIN_METRICS))
        if metric == "validation_loss" and not tried.data.validation:
            raise SpecError("the target has no validation data", where=f"metric {metric}", fix="name data.validation")


def _check_population(spec: SweepSpec) -> None:
    """A member goes on from another's checkpoint with fields changed: with those that may change in a run."""
    odd = [name for name in spec.space if name not in _ALONG_THE_WAY]
    if spec.trial == "heavy" and spec.scheduler == "pbt" and odd:
        known = ", ".join(_ALONG_THE_WAY)
        raise SpecError("cannot change on the way of a population", where=f"space {odd[0]}", fix=f"use {known}")
