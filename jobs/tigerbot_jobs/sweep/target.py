"""What a trial runs: a train spec with some fields changed, in the trial's own process, or `module:function`.

A target function takes `(params, report)`, calls `report(metrics)` as often as it likes, and returns nothing.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tigerbot.errors import SpecError
from tigerbot.spec import TrainSpec, load_spec, spec_hash

Report = Callable[[dict[str, float]], None]
Target = Callable[[Mapping[str, Any], Report], None]


def load_target(target: str, fixed: Mapping[str, Any], *, threads: int) -> tuple[Target, str]:
    """The function of a sweep's target, and a hash of what it computes.

    Raises:
        SpecError: there is no such file or function, or a fixed field is wrong.
    """
    if target.endswith((".yaml", ".yml")):
        spec = _changed(target, fixed)
        return _TrainTarget(str(Path(target).absolute()), dict(fixed), threads), spec_hash(spec)
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(
            f"cannot be imported ({error})", where=f"target {target}", fix="name a train spec or module:function"
        ) from None
    return _FunctionTarget(function, dict(fixed)), target


class _FunctionTarget:
    def __init__(self, function: Target, fixed: dict[str, Any]) -> None:
        self._function, self._fixed = function, fixed

    def __call__(self, params: Mapping[str, Any], report: Report) -> None:
        self._function(self._fixed | dict(params), report)


class _TrainTarget:
    """The training loop itself, as the only rank of a process group of one; what it writes is thrown away."""

    def __init__(self, path: str, fixed: dict[str, Any], threads: int) -> None:
        self._path, self._fixed, self._threads = path, fixed, threads

    def __call__(self, params: Mapping[str, Any], report: Report) -> None:
        import torch
        import torch.distributed as dist

        from tigerbot_jobs.train.alone import train_rank
        from tigerbot_jobs.train.prepared import WorkerJob

        folder = Path(tempfile.mkdtemp(prefix="trial-"))
        spec = _changed(self._path, self._fixed | dict(params) | {"storage.uri": str(folder)})
        train = [(Path(source.path).absolute(), source.weight) for source in spec.data.train]
        held_out = [Path(source.path).absolute() for source in spec.data.validation]
        job = WorkerJob(spec, spec_hash(spec), str(folder / spec.name), train, held_out, self._threads)
        (folder / spec.name).mkdir()
        # A trial's process runs many trials. DeepSpeed remembers the first process group it sees: that one stays.
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=0, world_size=1)
        try:
            train_rank(job, 0, 1, torch.device("cpu"), on_row=report, keep_model=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _changed(path: str, changes: Mapping[str, Any]) -> TrainSpec:
    spec = load_spec(path, [f"{field}={json.dumps(value)}" for field, value in changes.items()])
    if not isinstance(spec, TrainSpec):
        raise SpecError(f"kind: got {spec.kind}, a sweep wants train", where=path, fix="name a train spec")
    text = [source.path for source in spec.data.train if source.format != "tokens"]
    if text:
        raise SpecError("a trial reads packed tokens only", where=text[0], fix="run a corpus spec and name its shards")
    return spec
