"""Everything of a training job that can be checked before anything is started, and the room it needs on a cluster."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from tigerbot.errors import CorruptError, DataError, InputError, ModelError
from tigerbot.models import model_hash, preset_config, tokenizer_hash
from tigerbot.runs import Run, read_json, write_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import Store, open_store
from tigerbot.tokens import TokenShards
from tigerbot_jobs.train.checkpoint import read_header
from tigerbot_jobs.train.data import check_tokenizer, plan_batches, prepared
from tigerbot_jobs.train.deepspeed_config import deepspeed_config
from tigerbot_jobs.train.deepspeed_limits import check_limits
from tigerbot_jobs.train.given import WorkerJob, threads_of
from tigerbot_jobs.train.goodput_text import LEDGER
from tigerbot_jobs.train.identity import check_same, fields_of
from tigerbot_jobs.train.ledger import read_events
from tigerbot_jobs.train.model import tokenizer_folder

_KNOWN = "identity.json"
_CROWD = 8  # workers to a core: on a laptop a few may share one, a fleet may not


def checked(run: Run, spec: TrainSpec) -> WorkerJob:
    """The job of every rank, or the one line that says why it cannot be done."""
    workers = _workers(spec)
    plan = plan_batches(spec, workers)
    on_gpu = spec.scale.gpus_per_worker > 0
    bf16 = on_gpu and spec.train.precision != "fp32"
    check_limits(deepspeed_config(spec.train, spec.deepspeed, plan, parameters=1, bf16=bf16), on_gpu=on_gpu)
    if spec.model.preset:
        preset_config(spec.model.preset, 512)
    elif spec.model.path and not Path(spec.model.path).is_dir():
        raise ModelError("there is no such folder", where=spec.model.path, fix="correct model.path")
    if spec.model.weights and not Path(spec.model.weights).is_dir():
        raise ModelError("there is no such folder", where=spec.model.weights, fix="correct model.weights")
    tokenizer = tokenizer_folder(spec.model)
    wanted = tokenizer_hash(_tokenizer_exists(tokenizer))

    def source_folder(index: int, name: str) -> Path:
        return run.folder / "tokens" / f"{name}-{index}"

    length = spec.data.sequence_length
    train = [
        (prepared(s, source_folder(i, "train"), tokenizer, length).absolute(), s.weight)
        for i, s in enumerate(spec.data.train)
    ]
    validation = [
        prepared(s, source_folder(i, "validation"), tokenizer, length).absolute()
        for i, s in enumerate(spec.data.validation)
    ]
    for folder in [*(folder for folder, _ in train), *validation]:
        shards = TokenShards(folder, length)
        check_tokenizer(shards, wanted)
    if spec.model.path and not spec.lora:
        model_hash(spec.model.path)
    check_writable(open_store(_absolute_storage(spec).uri), spec.name)
    local = spec.model_copy(update={"model": _absolute(spec), "storage": _absolute_storage(spec)})
    job = WorkerJob(local, run.hash, str(run.folder.absolute()), train, validation, threads_of(spec, workers))
    check_goes_on(job, wanted)
    return job


def check_goes_on(job: WorkerJob, tokenizer: str) -> None:
    """What is kept of this run is of this model, tokenizer and data, in storage and, by the run's folder, in memory.

    Raises:
        IdentityError: it is not; each field that differs is named.
        ModelError: the model has no config.
    """
    now = {"tokenizer_hash": tokenizer, "data_hash": job.data_hash, "model": fields_of(job.spec)}
    store = open_store(job.spec.storage.uri)
    for key in reversed(store.committed(f"{job.spec.name}/checkpoints")):
        with contextlib.suppress(CorruptError):  # the ranks will set it aside, and say so
            read_header(store, key).check(f"checkpoint {key}", spec_hash=job.hash, **now)
            break
    known, ledger = Path(job.folder) / _KNOWN, Path(job.folder) / LEDGER
    if ledger.exists() and any(event.kind == "steps" for event in read_events(ledger)):
        check_same(read_json(known, {}), now, where=job.folder)
    write_json(known, now)


def check_writable(store: Store, name: str) -> None:
    """Raises: StorageError: nothing can be kept there; better said now than at the first checkpoint."""
    key = f"{name}/.writable"
    store.put_bytes(key, b"")
    store.delete(key)


def local_cpus(spec: TrainSpec) -> int:
    """Logical CPUs of a cluster of this machine's own: every worker, and every standby the spec names, has a slot.

    Raises:
        InputError: they would share too few cores to get anywhere.
    """
    standbys = spec.scale.standbys if isinstance(spec.scale.standbys, int) else 0
    wanted = math.ceil((_workers(spec) + standbys) * spec.scale.cpus_per_worker)
    cores = os.cpu_count() or 1
    if wanted > _CROWD * cores:
        raise InputError(
            f"{_workers(spec) + standbys} workers and standbys want {wanted} CPUs, this machine has {cores}",
            where=f"{spec.name}: scale.workers",
            fix="ask for fewer, or submit it to a cluster",
        )
    return max(cores, wanted)


def slots_of(spec: TrainSpec) -> int:
    """Workers that the cluster can hold.

    Raises:
        InputError: fewer than the run needs.
    """
    import ray

    has, scale = ray.cluster_resources(), spec.scale
    slots = int(has.get("CPU", 0) / scale.cpus_per_worker + 1e-6)
    if scale.gpus_per_worker:
        slots = min(slots, int(has.get("GPU", 0) / scale.gpus_per_worker + 1e-6))
    low = scale.bounds[0]
    if slots < low:
        raise InputError(
            f"wants at least {low} workers, the cluster can hold {slots} "
            f"({has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs)",
            where=f"{spec.name}: scale.workers",
            fix="ask for fewer, or for less of each",
        )
    return slots


def _workers(spec: TrainSpec) -> int:
    return spec.scale.bounds[1]


def _tokenizer_exists(folder: str) -> str:
    if not (Path(folder) / "tokenizer.json").exists():
        raise DataError("has no tokenizer.json", where=folder, fix="run the corpus first, or correct model.tokenizer")
    return folder


def _absolute(spec: TrainSpec) -> Any:
    """The model's folders as workers, which run elsewhere, find them."""
    folders = {
        name: str(Path(value).absolute())
        for name in ("path", "tokenizer")
        if (value := getattr(spec.model, name)) is not None and Path(value).exists()
    }
    return spec.model.model_copy(update=folders)


def _absolute_storage(spec: TrainSpec) -> Any:
    uri = spec.storage.uri
    return spec.storage if "://" in uri else spec.storage.model_copy(update={"uri": str(Path(uri).absolute())})
