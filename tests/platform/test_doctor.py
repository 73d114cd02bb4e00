"""The doctor: quick, a line a finding, and a FAIL is an exit status."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tigerbot import doctor

TIGER = "import tigerbot.cli as c, tigerbot.verbs_cluster as v; v.register(c.app); c.main()"
SERVE = "kind: serve\nname: talk\nmembers: {creative: /models/a}\nhttp: {host: %s}\n"


def tiger_doctor(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", TIGER, "doctor", *words]
    return subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=60)


def lines(findings: object) -> str:
    return "\n".join(finding.line() for finding in findings)  # type: ignore[attr-defined]


def test_a_machine_that_is_set_up_has_no_fail_and_the_answer_comes_in_seconds() -> None:
    began = time.monotonic()
    answer = tiger_doctor()
    took = time.monotonic() - began

    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert all(line.split()[0] in ("ok", "warn") for line in answer.stdout.splitlines()) and took < 20
    for part in (
        "Python 3.11",
        "cores",
        "memory",
        "disk",
        "port 8000",
        "port 8265",
        "torch",
        "Ray 2.60",
        "DeepSpeed",
        "MLflow",
        "S3",
    ):
        assert part in answer.stdout, part


def test_a_machine_without_a_compiler_fails_with_what_to_install(tmp_path: Path) -> None:
    answer = tiger_doctor(PATH=str(tmp_path))

    assert answer.returncode == 1
    assert "no g++" in answer.stdout and "apt-get install g++" in answer.stdout
    assert [line.split()[0] for line in answer.stdout.splitlines()].count("FAIL") == 1


def test_a_taken_port_is_said_with_how_to_find_who() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = lines(doctor.ports({port: "serving"}))

    assert said == f"warn port {port} (serving) is taken: see who: ss -ltnp 'sport = :{port}'"
    assert lines(doctor.ports({port: "serving"})) == f"ok   port {port} (serving) is free"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "warn Ray's token authentication is disabled: unset RAY_AUTH_MODE"),
        ({"RAY_AUTH_MODE": "token"}, "warn RAY_AUTH_MODE=token, but there is no token: ray get-auth-token --generate"),
        ({"RAY_AUTH_TOKEN": "secret-token"}, "ok   Ray's token authentication is on (RAY_AUTH_TOKEN)"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such"}, "FAIL RAY_AUTH_TOKEN_PATH=/no/such names a file that cannot be read"),
        ({}, "ok   Ray's token authentication: a token is made"),
    ],
)
def test_ray_authentication_is_explained_and_the_token_never_shown(
    env: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    answer = lines(doctor.ray())

    assert said in answer and "secret-token" not in answer


def test_s3_credentials_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    none = lines(doctor.s3())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    half = lines(doctor.s3())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    both = lines(doctor.s3())

    assert none.startswith("warn no S3 credentials") and both.startswith("ok")
    assert half == "warn S3: AWS_ACCESS_KEY_ID is set, AWS_SECRET_ACCESS_KEY is not: set both"


@pytest.mark.parametrize(("host", "level"), [("127.0.0.1", "ok"), ("0.0.0.0", "warn")])
def test_serving_beyond_this_machine_warns_of_the_ports_it_opens(tmp_path: Path, host: str, level: str) -> None:
    spec = tmp_path / "serve.yaml"
    spec.write_text(SERVE % host)

    answer = tiger_doctor(str(spec))

    said = answer.stdout.splitlines()[-1]
    assert said.startswith(level) and answer.returncode == 0
    assert ("30000-31000" in said and "firewall" in said) == (level == "warn")


def broken_machine(patch: pytest.MonkeyPatch) -> None:
    """Everything that the doctor looks at is missing or too small."""
    usage = namedtuple("usage", "total used free")
    patch.setattr(sys, "version_info", (3, 12, 1))
    patch.setattr(os, "sched_getaffinity", lambda pid: {0})
    patch.setattr(doctor.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(2**30))
    patch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**30))
    patch.setattr(doctor, "_version", lambda package: None)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such")


def test_each_line_that_is_not_ok_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, monkeypatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broken_machine(patch)
        findings = [
            finding
            for check in (
                doctor.python,
                doctor.machine,
                doctor.gpu,
                doctor.ray,
                doctor.compiler,
                doctor.mlflow,
                doctor.s3,
            )
            for finding in check()
        ]
        findings += [*doctor.ports({taken.getsockname()[1]: "serving"}), *doctor.serving("0.0.0.0")]

    said = [finding.what for finding in findings]
    for part in (
        "3.12",
        "1 core",
        "memory",
        "disk",
        "torch",
        "Ray",
        "DeepSpeed",
        "MLflow",
        "S3",
        "taken",
        "opens port",
    ):
        assert any(part in what for what in said), part
    assert all(finding.level != "ok" and finding.fix for finding in findings)


@pytest.mark.parametrize(("torch", "level"), [("2.13.0+cpu", "warn"), ("2.13.0", "ok")])
def test_a_gpu_beside_a_torch_for_cpus_is_said_with_the_command(
    torch: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: torch)
    monkeypatch.setattr(doctor, "_gpu_names", lambda: ["NVIDIA H100"])

    (found,) = doctor.gpu()

    assert found.level == level and "1 x NVIDIA H100" in found.what
    assert ("pip install" in found.fix) == (level == "warn")


def test_a_wrong_spec_is_one_line() -> None:
    answer = tiger_doctor("/no/such.yaml")

    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
