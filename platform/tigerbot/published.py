"""What a run found, where its storage is a bucket: put there when it is done, brought back where it is not known.

A job works in a local folder (`runs.local_root`), which a cluster removes with the job. Training keeps its checkpoints
and its model in the bucket by itself, since rank 0's node may not be the driver's; every other kind is published here.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from tigerbot.runs import Run
from tigerbot.spec import Spec
from tigerbot.storage import MANIFEST, MissingError, Store, open_store

# What stays with the process that wrote it: the outbox delivers what it holds, and Ray's folder is Ray's.
_LOCAL = ("tracking.", "ray", "checkpoints", "state.json")


def publish(run: Run) -> None:
    """Put a finished run's folder into its bucket, its state last: whoever finds that finds all of it."""
    store = _bucket(run.spec)
    if store is None:
        return
    name = run.spec.name
    for path in sorted(run.folder.iterdir()):
        if path.name.startswith((".", *_LOCAL)):
            continue
        if path.is_dir():
            store.commit_folder(path, f"{name}/{path.name}")
        else:
            store.put_file(path, f"{name}/{path.name}")
    store.put_file(run.folder / "state.json", f"{name}/state.json")
    print(f"  published to {store.at(name)}", flush=True)


def recall(run: Run) -> None:
    """Bring a finished run of this name and spec here, where another machine published one."""
    store = _bucket(run.spec)
    if store is None or run.done:
        return
    name = run.spec.name
    try:
        state = json.loads(store.get_bytes(f"{name}/state.json"))
    except MissingError:
        return
    if state.get("hash") != run.identity or state.get("status") != "done":
        return
    entries = {PurePosixPath(entry.key).relative_to(name) for entry in store.list(name)}
    folders = {path.parts[0] for path in entries if len(path.parts) == 2 and path.name == MANIFEST}
    for folder in sorted(folders):
        store.fetch_folder(f"{name}/{folder}", run.folder / folder)
    for path in sorted(path for path in entries if len(path.parts) == 1):
        if path.name != "state.json":
            store.get_file(f"{name}/{path}", run.folder / path)
    store.get_file(f"{name}/state.json", run.folder / "state.json")


def _bucket(spec: Spec) -> Store | None:
    uri = spec.storage.uri
    return open_store(uri) if uri.startswith("s3://") and spec.kind not in ("train", "serve") else None
