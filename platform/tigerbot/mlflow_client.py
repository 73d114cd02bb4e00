"""MLflow for a verb that a person waits for: a client that gives up soon, one line for what goes wrong, a folder's run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_server import serve_tracking

FOLDER, KIND = "tiger.folder", "tiger.kind"  # tags


@contextmanager
def mlflow_client(uri: str) -> Iterator[Any]:
    """An `MlflowClient` of the tracking server at `uri`, started for the time being where it is a database.

    Raises:
        TrackingError: there is no such database, nobody answers, or MLflow refuses what is asked of it.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise TrackingError("there is no such database", where=uri, fix="run a job first, or correct the tracking URI")
    # MLflow's own retries would hold the terminal for minutes before saying that nobody answers.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = serve_tracking(uri)
    try:
        yield MlflowClient(server.url)
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow does not do it ({why(error)})", where=uri, fix="try again when it does") from None
    finally:
        server.stop()


def run_of_folder(api: Any, experiment: str, folder: Path, kind: str) -> str | None:
    """The id of the newest run that a job's folder has; a replaced one left older runs."""
    found = api.get_experiment_by_name(experiment)
    if found is None:
        return None
    quote = '"' if "'" in str(folder) else "'"
    mine = f"tags.`{FOLDER}` = {quote}{folder}{quote} and tags.`{KIND}` = '{kind}'"
    runs = api.search_runs([found.experiment_id], mine, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def why(error: BaseException) -> str:
    """What MLflow's client says of a server that is away is a line of three others' exceptions."""
    away = re.match(r"API request to https?://(?:\S+@)?([^/\s]+)\S* failed with (timeout )?exception", str(error))
    return f"{away[1]} does not answer" if away else first_line(error)
