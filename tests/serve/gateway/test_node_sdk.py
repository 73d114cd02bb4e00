"""The official Node client against the endpoint: what works there works unchanged in a team's web code."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tigerbot_serve.gateway.keys import KeyRing

SCRIPT = Path(__file__).with_name("sdk.mjs")
VERSIONS = {22: "7.57.0", 20: "6.30.1"}  # by the oldest Node that each one takes


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and the script."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    major = int(subprocess.check_output([node, "--version"], text=True).lstrip("v").split(".")[0])
    version = next((version for oldest, version in VERSIONS.items() if major >= oldest), None)
    if version is None:
        pytest.skip(f"node {major} is older than {min(VERSIONS)}")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    shutil.copy(SCRIPT, folder)
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", f"openai@{version}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("the npm registry does not answer")
    if done.returncode != 0:
        pytest.skip(f"openai {version} cannot be installed from npm: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.soak
def test_the_official_node_client_works_unchanged(installed: Path, serve_engine, heads) -> None:
    keys = KeyRing((hashlib.sha256(b"secret").digest(),))
    served = serve_engine(keys=keys, heads=str(heads(p_dev=-3.0)))

    done = subprocess.run(
        ["node", "sdk.mjs", served.url], cwd=installed, capture_output=True, text=True, timeout=200, encoding="utf-8"
    )

    assert done.returncode == 0, done.stderr
    saw: dict[str, Any] = json.loads(done.stdout)
    assert saw["text"] and saw["text"] == saw["streamed"] == saw["held"]
    assert saw["usage"] == saw["spent"] >= saw["logprobs"] > 0
    assert saw["finish"] in ("stop", "length") and saw["chunks"] > 3 and saw["nameless"] == 0
    assert saw["requestId"] and saw["verdict"] == "unverified" and isinstance(saw["plain"], str)
    assert saw["models"] == ["tiger"] and saw["model"] == "tiger"
    assert saw["widths"] == [256, 256] and saw["apart"] < 1e-5
    assert saw["wrongKey"] == {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None}
    assert saw["wrongModel"]["kind"] == "NotFoundError" and saw["wrongModel"]["code"] == "model_not_found"
    assert saw["wrongField"] == {
        "kind": "BadRequestError",
        "status": 400,
        "code": "invalid_value",
        "param": "temperature",
    }
    assert saw["wrongInput"]["param"] == "input"
    served.settle()
