"""The verbs `submit`, `jobs`, `logs`, `stop` and `doctor`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tigerbot.options import Extend, Overrides, Replace, SpecFile

ClusterUrl = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="URL", envvar=["TIGER_CLUSTER", "RAY_API_SERVER_ADDRESS"], help="Ray's dashboard"
    ),
]
LOCAL = "http://127.0.0.1:8265"


def register(app: typer.Typer) -> None:
    """Add the verbs to the `tiger` command."""
    for verb in (submit, jobs, logs, stop, doctor):
        app.command()(verb)


def submit(
    spec: SpecFile,
    cluster: ClusterUrl = LOCAL,
    overrides: Overrides = None,
    replace: Replace = False,
    extend: Extend = False,
) -> None:
    """Run a job on a cluster, once. Example: tiger submit jobs/corpus.yaml --cluster http://head:8265 --set storage.uri=/mnt/runs"""
    from tigerbot.jobs import submit as submit_job

    done = submit_job(spec, overrides or [], cluster, replace, extend)
    print(done.state.line() if done.started else f"{done.state.line()}  (submitted before)")
    if done.state.lives:
        print(f"follow it: tiger logs {done.id} -f --cluster {cluster}")


def jobs(cluster: ClusterUrl = LOCAL) -> None:
    """List the jobs of a cluster. Example: tiger jobs --cluster http://head:8265"""
    from tigerbot.jobs import jobs as list_jobs

    states = list_jobs(cluster)
    for state in states:
        print(state.line())
    if not states:
        print("no jobs")


def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="a job's id, or its name for the latest")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on until the job ends")] = False,
    cluster: ClusterUrl = LOCAL,
) -> None:
    """Print a job's log; with -f, exit 1 if it fails. Example: tiger logs town -f --cluster http://head:8265"""
    from tigerbot.errors import ClusterError
    from tigerbot.job_client import cluster_errors, follow_log, job_client
    from tigerbot.jobs import find

    state = find(job, cluster)
    client = job_client(cluster)
    if not follow:
        with cluster_errors(cluster):
            print(client.get_job_logs(state.id), end="")
        return
    for piece in follow_log(client, cluster, state.id):
        print(piece, end="", flush=True)
    state = find(state.id, cluster)
    print(state.line())
    if state.status == "FAILED":
        raise ClusterError(f"the job failed ({state.message})", where=state.id, fix="submit it again to resume")


def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a run or endpoint of this machine, or a cluster's job")],
    cluster: ClusterUrl = LOCAL,
    folder: Annotated[Path, typer.Option("--in", metavar="FOLDER", help="where runs of this machine are")] = Path(
        "tiger-runs"
    ),
) -> None:
    """Stop a run or an endpoint here, or a cluster's job, and wait until it has ended. Example: tiger stop town"""
    from tigerbot.living import living, stop_run

    here = [run for run in living(folder) if run.name == name]
    for run in here:
        stop_run(run)
        print(f"{run.name}: stopped" + ("" if run.kind == "serve" else "; the same command continues it"))
    if not here:
        from tigerbot.jobs import stop as stop_job

        print(stop_job(name, cluster).line())


def doctor(
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="a serve spec, to check its address")] = None,
) -> None:
    """Say what this machine has, what is missing, what to do. Example: tiger doctor"""
    from tigerbot.doctor import examine

    findings = examine(spec)
    for finding in findings:
        print(finding.line())
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)
