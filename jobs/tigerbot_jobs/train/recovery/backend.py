"""Ray Train beneath us: it places the workers and replaces the dead; who trains with whom is the hub's.

A backend with replica groups is the one path in Ray 2.60 that replaces only the worker that died. It is an internal
attribute: where a later Ray no longer knows it, the whole group is restarted instead, and the same train function goes on
from memory, only slower.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tigerbot.spec import Scale
from tigerbot_jobs.train.recovery.entry import heed_sigterm

HEALTH_CHECK_S = 1.0  # until Ray begins to replace a worker; the hub knows in a millisecond that it is gone
_KILLED_S = 30.0  # on a full machine even being killed takes a while


class _OwnGroups(Backend):
    """No process group of Ray's: ours comes and goes with the generations."""

    share_cuda_visible_devices: bool = True
    has_replica_groups: bool = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(heed_sigterm)


@dataclass
class OwnGroups(BackendConfig):
    """For `DataParallelTrainer(backend_config=...)`. It is not Ray's for torch, which imports torch before ours can be
    done in the background."""

    @property
    def backend_cls(self) -> type[_OwnGroups]:
        return _OwnGroups


class Workers:
    """A group of workers, kept by Ray Train from a thread of its own.

    Args:
        live: what every worker runs, given `about`.
        scale: what each takes.
        folder, name: `<folder>/<name>` is Ray Train's.
        count: ranks and standbys.
        environment: of every worker.
    """

    def __init__(
        self,
        live: Callable[[Any], None],
        about: Any,
        scale: Scale,
        folder: Path,
        count: int,
        environment: dict[str, str],
        *,
        name: str = "ray",
    ) -> None:
        gpus = scale.gpus_per_worker
        self.error: Exception | None = None
        self._trainer = DataParallelTrainer(
            live,  # type: ignore[arg-type]
            train_loop_config=about,
            backend_config=OwnGroups(),
            scaling_config=ScalingConfig(
                num_workers=count,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": scale.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(folder),
                # The hub counts; a worker that Ray sees die is one to replace, as often as it takes.
                failure_config=FailureConfig(max_failures=-1),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name="ray-train")
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def end(self, timeout_s: float) -> None:
        """Wait until Ray Train has ended; end its controller if it does not (it may wait for room for a replacement).

        It must have before Ray is shut down: a thread that still waits for an answer takes the whole process with it.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _kill_controllers()
            self._thread.join(_KILLED_S)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


def _kill_controllers() -> None:
    """Ray Train keeps the handle of its controller to itself; the workers are the controller's, and go with it."""
    import ray
    import ray._private.state
    import ray._private.worker
    from ray._raylet import ActorID

    worker: Any = ray._private.worker.global_worker
    with contextlib.suppress(Exception):  # Ray is gone
        actors = ray._private.state.actors()  # type: ignore[reportPrivateImportUsage]
        # In an actor (a trial of a sweep) the job holds other runs' controllers too: ours are those that we own.
        me = actors.get(ray.get_runtime_context().get_actor_id() or "")
        for name, actor in actors.items():
            ours = actor["OwnerAddress"] == me["Address"] if me else actor["JobID"] == worker.current_job_id.hex()
            if actor["ActorClassName"] == "TrainController" and actor["State"] != "DEAD" and ours:
                worker.core_worker.kill_actor(ActorID.from_hex(name), True)
