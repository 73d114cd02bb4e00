"""Jobs on a cluster, over Ray's Jobs API: submit, list, follow, stop.

A job's identity is its spec's name and hash, and so is its submission id: submitted twice, it runs once, whoever
submits. A job that failed or was stopped is submitted again under a numbered id and resumes where its run was. The
working folder travels with the job, without what `.gitignore` names; results have to go where every node can write.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.errors import ClusterError, IdentityError, InputError
from tigerbot.job_client import cluster_errors, job_client
from tigerbot.spec import Spec, load_spec, spec_difference, spec_hash

EXCLUDED = [".git", ".venv", "tiger-runs"]
LIVING = ("PENDING", "RUNNING")
STOP_DEADLINE_S = 60.0


@dataclass(frozen=True)
class JobState:
    """A job as its cluster knows it. Times are seconds since the epoch, 0 where not known."""

    id: str
    name: str
    hash: str
    status: str
    message: str
    began: float
    ended: float
    spec: str

    @property
    def lives(self) -> bool:
        return self.status in LIVING

    def line(self) -> str:
        end = self.ended or time.time()
        took = f"{end - self.began:,.0f} s" if self.began else "not begun"
        return f"{self.id}  {self.status}  {took}"


@dataclass(frozen=True)
class Submission:
    """What `submit` did: the job's id, its state, and whether this call started it."""

    id: str
    state: JobState
    started: bool


def submit(
    spec_file: str | Path,
    overrides: Sequence[str],
    cluster: str,
    replace: bool = False,
    extend: bool = False,
    *,
    folder: str | Path = ".",
) -> Submission:
    """Submit a spec to a cluster, once.

    Args:
        spec_file: a spec below `folder`.
        overrides: `a.b=c`.
        cluster: the dashboard's address, `http://host:8265`.
        replace: stop what lives under this name and begin anew.
        extend: go on with a run that has ended to the larger size that this spec wants.
        folder: what travels with the job and is its working folder there.

    Raises:
        SpecError: the spec is wrong.
        InputError: the spec lies outside the folder, or its results would be lost with the job.
        IdentityError: a job of this name and another spec lives.
        ClusterError: the cluster cannot be reached, or refuses.
    """
    spec = load_spec(spec_file, overrides)
    entrypoint = _entrypoint(Path(spec_file), overrides, Path(folder), {"--replace": replace, "--extend": extend})
    _keeps_results(spec)
    identity = spec_hash(spec)
    client = job_client(cluster)
    known = [job for job in jobs(cluster) if job.name == spec.name]
    same = [job for job in known if job.hash == identity]
    if not replace:
        _refuse_another(spec, identity, known, cluster)
        done = [job for job in same if job.lives or job.status == "SUCCEEDED"]
        if done:
            return Submission(done[-1].id, done[-1], started=False)
    for job in known:
        if job.lives:
            stop(job.id, cluster)
    attempt = f"-{len(same) + 1}" if same else ""
    job_id = f"{spec.name}-{identity}{attempt}"
    started = True
    with cluster_errors(cluster):
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(Path(folder).resolve()), "excludes": EXCLUDED},
                metadata={"name": spec.name, "hash": identity, "spec": _identity_of(spec)},
            )
        except RuntimeError as error:
            # Another submitter of the same spec was quicker: it is the one job both asked for.
            if "already exists" not in str(error):
                raise
            started = False
    return Submission(job_id, find(job_id, cluster), started)


def jobs(cluster: str) -> list[JobState]:
    """The jobs of a cluster that were submitted, oldest first."""
    client = job_client(cluster)
    with cluster_errors(cluster):
        found = [_state(job) for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: (job.began, job.id))


def find(job: str, cluster: str) -> JobState:
    """A job by its id, or the latest one of a name.

    Raises:
        InputError: there is none.
    """
    known = jobs(cluster)
    named = [state for state in known if state.id == job] or [state for state in known if state.name == job]
    if not named:
        names = ", ".join(sorted({state.name or state.id for state in known})) or "none"
        raise InputError(f"no job is called {job!r} (there is: {names})", where=cluster, fix="see `tiger jobs`")
    living = [state for state in named if state.lives]
    return (living or named)[-1]


def stop(job: str, cluster: str, deadline_s: float = STOP_DEADLINE_S) -> JobState:
    """Stop a job and wait until it has ended; one that has ended already is left as it is.

    Raises:
        InputError: there is no such job.
        ClusterError: it did not end in time.
    """
    state = find(job, cluster)
    client = job_client(cluster)
    deadline = time.monotonic() + deadline_s
    if state.lives:
        with cluster_errors(cluster):
            client.stop_job(state.id)
    while state.lives:
        if time.monotonic() > deadline:
            raise ClusterError(f"{state.id} did not stop in {deadline_s:.0f} s", where=cluster, fix="stop it again")
        time.sleep(0.3)
        state = find(state.id, cluster)
    return state


def _refuse_another(spec: Spec, identity: str, known: list[JobState], cluster: str) -> None:
    for job in known:
        if job.lives and job.hash != identity:
            lines = spec_difference(json.loads(job.spec or "{}"), json.loads(_identity_of(spec)))
            raise IdentityError(
                f"job {spec.name} is {job.status.lower()} with another spec ({'; '.join(lines[:4])})",
                where=cluster,
                fix="wait for it, give this one another name, or --replace to stop it",
            )


def _entrypoint(spec_file: Path, overrides: Sequence[str], folder: Path, flags: dict[str, bool]) -> str:
    try:
        there = spec_file.resolve().relative_to(folder.resolve())
    except ValueError:
        raise InputError(
            f"lies outside {folder.resolve()}, which is what travels with the job",
            where=str(spec_file),
            fix="submit from a folder that holds the spec and its code",
        ) from None
    words = ["python", "-m", "tigerbot.cli", "run", there.as_posix()]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words + [flag for flag, wanted in flags.items() if wanted])


def _keeps_results(spec: Spec) -> None:
    uri = spec.storage.uri
    if "://" not in uri and not Path(uri).is_absolute():
        raise InputError(
            f"storage.uri is {uri!r}: on a cluster that is the job's own copy of the folder, lost with it",
            where=spec.name,
            fix="--set storage.uri=s3://bucket/prefix, or an absolute path that every node mounts",
        )


def _identity_of(spec: Spec) -> str:
    return json.dumps(spec.model_dump(mode="json", exclude={"storage", "tracking"}), ensure_ascii=False)


def _state(job: Any) -> JobState:
    about = job.metadata or {}
    return JobState(
        id=job.submission_id,
        name=about.get("name", ""),
        hash=about.get("hash", ""),
        status=str(getattr(job.status, "value", job.status)),
        message=" ".join((job.message or "").split()),
        began=(job.start_time or 0) / 1000,
        ended=(job.end_time or 0) / 1000,
        spec=about.get("spec", ""),
    )
