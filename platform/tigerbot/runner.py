"""From a spec to its result: open the run, hand it to whatever installed package claims its kind.

Kinds are found through the entry-point group `tigerbot.kinds`, so that the ground floor imports nothing above it
and a serving image needs no training package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from tigerbot.errors import InputError, TigerError
from tigerbot.notify import notify
from tigerbot.published import publish, recall
from tigerbot.runs import Run, open_run
from tigerbot.spec import ServeSpec, Spec, TrainSpec
from tigerbot.staging import disk_full, is_full
from tigerbot.tracking import deliver_leftovers

JobFunction = Callable[[Run], dict[str, Any]]


class Endpoint(Protocol):
    """Something deployed: its address, and how to take it down."""

    url: str

    def stop(self) -> None: ...


def job_function(kind: str) -> JobFunction:
    """The function that runs a kind: `run(run) -> result`.

    Raises:
        InputError: no installed package claims this kind.
    """
    return _claimed("tigerbot.kinds", kind)


def deploy_spec(spec: ServeSpec, folder: Path) -> Endpoint:
    """Deploy an ensemble and return without waiting for it to end; `folder` takes its logs.

    Raises:
        InputError: no serving package is installed.
        ServeError: it could not be deployed.
    """
    return _claimed("tigerbot.deployers", spec.kind)(spec, folder=folder)


def preview_spec(spec: Spec) -> list[str]:
    """What running a spec would do, as lines; nothing for a kind that has no preview."""
    if not [point for point in entry_points(group="tigerbot.previews") if point.name == spec.kind]:
        return []
    return _claimed("tigerbot.previews", spec.kind)(_found(spec))


def _claimed(group: str, kind: str) -> Callable[..., Any]:
    found = [point for point in entry_points(group=group) if point.name == kind]
    if not found:
        raise InputError(f"nothing installed runs kind {kind!r}", where="kind", fix="install the package that has it")
    module, _, name = found[0].value.partition(":")
    return getattr(importlib.import_module(module), name)


def _found(spec: Spec) -> Spec:
    """The spec with a hub model as the folder of its cached files, which every job can read."""
    if not isinstance(spec, TrainSpec) or spec.model.hub is None:
        return spec
    from tigerbot.models import hub_folder

    folder = {"path": str(hub_folder(spec.model.hub)), "hub": None}
    return spec.model_copy(update={"model": spec.model.model_copy(update=folder)})


def run_spec(spec: Spec, *, replace: bool = False, extend: bool = False) -> dict[str, Any]:
    """Run a spec here to its end, or return the kept result of a run that is done.

    Raises:
        TigerError: the job failed, or its input was wrong.
    """
    function = job_function(spec.kind)
    run = open_run(spec, replace=replace, extend=extend)
    try:
        recall(run)
        if run.done and spec.kind != "serve":
            print(f"{spec.name}: done already ({run.folder})", flush=True)
            deliver_leftovers(run)
            publish(run)
            return run.state["result"]
        run.spec = _found(spec)
        result = function(run)
        publish(run)
        notify("done", spec)
        return result
    except TigerError as error:
        run.fail(str(error))
        notify("failed", spec, str(error))
        raise
    except Exception as error:
        if not is_full(error):
            raise
        full = disk_full(getattr(error, "filename", None) or run.folder)
        run.fail(str(full))
        notify("failed", spec, str(full))
        raise full from None
    except (KeyboardInterrupt, SystemExit):
        notify("stopped", spec)
        raise
    finally:
        run.close()
