"""What every rank of a run is given. It imports no torch: a worker has this before it has anything else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tigerbot.spec import TrainSpec
from tigerbot.tokens import manifests_hash


@dataclass(frozen=True)
class WorkerJob:
    """What every rank is given. `hub` and `token` are empty where a rank has no hub."""

    spec: TrainSpec
    hash: str
    folder: str
    train: list[tuple[Path, float]]
    validation: list[Path]
    threads: int
    hub: str = ""
    token: str = ""
    run_id: str = ""

    @property
    def data_hash(self) -> str:
        """Identity of the token shards of training, whatever their paths."""
        return manifests_hash(folder for folder, _ in self.train)

    @property
    def data_tags(self) -> dict[str, str]:
        """What MLflow is told of the data."""
        return {"tiger.data": self.data_hash}


def threads_of(spec: TrainSpec, workers: int) -> int:
    """Threads of a worker: as the spec says, else an equal part of this machine's cores."""
    return spec.scale.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)


def job_to(job: WorkerJob) -> dict[str, Any]:
    """As JSON says it."""
    return _JOB.dump_python(job, mode="json")


def job_from(said: dict[str, Any]) -> WorkerJob:
    """Raises: ValidationError: it is none."""
    return _JOB.validate_python(said)


_JOB: TypeAdapter[WorkerJob] = TypeAdapter(WorkerJob)
