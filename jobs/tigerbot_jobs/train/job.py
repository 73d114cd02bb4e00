"""`kind: train`: check everything that can be checked, then the run goes on under its hub until it is done."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tigerbot.cluster import connect
from tigerbot.errors import InputError
from tigerbot.progress import stage
from tigerbot.runs import Run, read_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import open_store
from tigerbot.tracking import TrackedRun, tracked
from tigerbot_jobs.train.checks import checked, local_cpus, slots_of
from tigerbot_jobs.train.exporter import Exporter, Live
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.goodput import LiveAccount, account, as_metrics
from tigerbot_jobs.train.islands.run import run_islands
from tigerbot_jobs.train.ledger import read_events
from tigerbot_jobs.train.metrics import Row, append_row, read_rows

if TYPE_CHECKING:
    from tigerbot_jobs.train.recovery.run import Hire
    from tigerbot_jobs.train.recovery.standing import Standing

# A step frees the same large tensors that the next one wants. glibc would hand them back to the kernel and fault them
# in again, page by page: 8% of a small model's step on a CPU.
_KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


LEDGER = "ledger.jsonl"


def run(run: Run) -> dict[str, Any]:
    """Train; write `model/`, `metrics.jsonl` and checkpoints into the run's folder."""
    spec = run.spec
    assert isinstance(spec, TrainSpec)
    job = checked(run, spec)
    if spec.islands is not None and spec.islands.member is None:
        return run_islands(run, job)
    with tracked(run, job.data_tags) as (_, its_run):
        cluster = connect(None, num_cpus=local_cpus(spec))
        try:
            result = _trained(run, job, its_run, alone=cluster.local)
        finally:
            cluster.stop()
    return run.finish(result)  # last: a run that is done is not opened again, and MLflow knows by now


def train_until(run: Run, on_row: Callable[[Row], None], stop: threading.Event, standing: Standing) -> None:
    """The same training by workers that stand, until it is done; once `stop` is set nobody wants it any more.

    A trial of a sweep: it has no MLflow run of its own.
    """
    spec = run.spec
    assert isinstance(spec, TrainSpec)
    _supervise(checked(run, spec), on_row, slots_of(spec), own_node_address(), hire=standing.hire, stop=stop)


def _trained(run: Run, job: WorkerJob, its_run: TrackedRun, *, alone: bool) -> dict[str, Any]:
    """The run under its hub, to its end. `alone`: no other machine has to reach the hub."""
    spec, rows = job.spec, list[Row]()
    slots = slots_of(spec)
    with _exporter(job, rows), stage(f"training {spec.name}", total=spec.train.tokens, unit="tokens") as shown:

        def on_row(row: Row) -> None:
            append_row(run.folder / "metrics.jsonl", row)
            rows[:] = [row]
            its_run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
            shown.update(row["tokens"], f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")

        _supervise(job, on_row, slots, "127.0.0.1" if alone else own_node_address())
    result = _result(run)
    its_run.log(_goodput(run), step=result["steps"])
    if spec.register_as:
        its_run.register(spec.register_as, run.folder / "model")
    print(
        f"  loss {result['loss']:.3f}, held out {result['validation_loss'] or math.nan:.3f}, "
        f"{result['tokens']:,} tokens at {result['tokens_per_second']:,.0f} a second"
    )
    return result


def _supervise(
    job: WorkerJob,
    on_row: Callable[[Row], None],
    slots: int,
    host: str,
    *,
    hire: Hire | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Train under the hub, until it is done or told to stop.

    Raises:
        TigerError: the run failed, for a reason that no recovery mends.
    """
    from tigerbot_jobs.train.recovery.run import Supervised, forget_memory, workers_of

    environment = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    environment |= _KEEP_MEMORY
    if not job.spec.scale.gpus_per_worker:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    supervised = Supervised(job, on_row, host=host, slots=slots, environment=environment, hire=hire or workers_of)
    ended = threading.Event()
    if stop is not None:
        threading.Thread(target=_drop_when, args=(stop, ended, supervised), daemon=True, name="stop").start()
    try:
        supervised.wait()
        forget_memory(job.spec, job.hash)
    except (KeyboardInterrupt, SystemExit):
        supervised.leave()
        raise
    finally:
        ended.set()
        supervised.close()


def _drop_when(stop: threading.Event, ended: threading.Event, supervised: Any) -> None:
    while not ended.wait(0.1):
        if stop.is_set():
            supervised.drop()
            return


def _goodput(run: Run) -> dict[str, float]:
    """Where the time went, as metrics."""
    return {
        name: value
        for name, value in as_metrics(account(read_events(run.folder / LEDGER))).items()
        if math.isfinite(value)
    }


def _exporter(job: WorkerJob, rows: list[Row]) -> AbstractContextManager[Any]:
    """Prometheus, where the spec names a port; `rows` holds the last metrics row."""
    port = job.spec.fault_tolerance.metrics_port
    if port is None:
        return nullcontext()
    ledger = LiveAccount(Path(job.folder) / LEDGER)

    def live() -> Live:
        row = rows[-1] if rows else {}
        about = (row.get("loss", math.nan), row.get("tokens_per_second", math.nan))
        return Live(ledger.now(until=time.time()), int(row.get("step", 0)), *about)

    exporter = Exporter(live, port=port)
    print(f"  metrics at {exporter.url}", flush=True)
    return exporter


def own_node_address() -> str:
    """This node's address, as the rest of the cluster reaches it."""
    import ray.util

    return ray.util.get_node_ip_address()


def _result(run: Run) -> dict[str, Any]:
    trained = read_json(run.folder / "trained.json", None) or _fetched(run)
    if trained is None:
        raise InputError("training ended without a model", where=str(run.folder), fix="run it again")
    rows = read_rows(run.folder / "metrics.jsonl")
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    rates = sorted(row["tokens_per_second"] for row in rows)
    uri = run.spec.storage.uri
    published = {"published": f"{uri.rstrip('/')}/{run.spec.name}/model"} if uri.startswith("s3://") else {}
    return (
        trained
        | published
        | {
            "model": str((run.folder / "model").absolute()),
            "loss": rows[-1]["loss"],
            "validation_loss": held_out[-1] if held_out else None,
            "tokens_per_second": rates[len(rates) // 2],
            "mfu": rows[-1].get("mfu"),
        }
    )


def _fetched(run: Run) -> dict[str, Any] | None:
    """What rank 0 published from another node, brought here."""
    if not run.spec.storage.uri.startswith("s3://"):
        return None
    store = open_store(run.spec.storage.uri)
    store.fetch_folder(f"{run.spec.name}/model", run.folder / "model")
    store.get_file(f"{run.spec.name}/trained.json", run.folder / "trained.json")
    return read_json(run.folder / "trained.json", None)
