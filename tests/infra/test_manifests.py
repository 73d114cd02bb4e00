"""The cluster files: valid for KubeRay's v1 API (the fields we use, checked against its CRDs of KubeRay 1.x)."""

import importlib
from pathlib import Path

import jsonschema
import pytest
import yaml

from tigerbot.spec import ServeSpec, load_spec
from tigerbot_serve.deploy.ingress import throughput
from tigerbot_serve.deploy.patience import haproxy_lines

INFRA = Path(__file__).parents[2] / "infra"

QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources"],
    "properties": {"resources": {"type": "object", "properties": {"limits": QUANTITIES, "requests": QUANTITIES}}},
}
POD_TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {"containers": {"type": "array", "minItems": 1, "items": CONTAINER}},
        }
    },
}
PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec", "rayVersion"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"const": "2.60.0"},
        "headGroupSpec": {
            "type": "object",
            "required": ["template", "rayStartParams"],
            "additionalProperties": False,
            "properties": {"template": POD_TEMPLATE, "rayStartParams": PARAMS},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer"},
                    "minReplicas": {"type": "integer"},
                    "maxReplicas": {"type": "integer"},
                    "rayStartParams": PARAMS,
                    "template": POD_TEMPLATE,
                },
            },
        },
    },
}
SPECS = {
    "RayJob": {
        "required": ["entrypoint", "rayClusterSpec"],
        "additionalProperties": False,
        "properties": {
            "entrypoint": {"type": "string"},
            "shutdownAfterJobFinishes": {"type": "boolean"},
            "ttlSecondsAfterFinished": {"type": "integer"},
            "backoffLimit": {"type": "integer"},
            "rayClusterSpec": CLUSTER,
        },
    },
    "RayService": {
        "required": ["serveConfigV2", "rayClusterConfig"],
        "additionalProperties": False,
        "properties": {
            "serviceUnhealthySecondThreshold": {"type": "integer"},
            "deploymentUnhealthySecondThreshold": {"type": "integer"},
            "serveConfigV2": {"type": "string"},
            "rayClusterConfig": CLUSTER,
        },
    },
}


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_manifest_is_what_kuberay_accepts(name: str) -> None:
    manifest = yaml.safe_load((INFRA / f"{name}.yaml").read_text())

    jsonschema.validate(manifest["spec"], SPECS[manifest["kind"]])

    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["metadata"]["name"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_secrets_come_from_secrets_and_ray_wants_its_token(name: str) -> None:
    text = (INFRA / f"{name}.yaml").read_text()

    assert "{name: RAY_AUTH_MODE, value: token}" in text
    assert "secretKeyRef" in text
    assert "sk-" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_the_serve_config_of_the_service_names_our_application() -> None:
    manifest = yaml.safe_load((INFRA / "rayservice.yaml").read_text())

    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])

    assert config["applications"][0]["import_path"] == "tigerbot_serve.deploy:application"
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_haproxy_of_the_service_outlives_the_longest_answer_of_the_cluster_spec() -> None:
    spec = load_spec(INFRA.parent / "serve" / "cluster.yaml")
    assert isinstance(spec, ServeSpec)
    text = (INFRA / "rayservice.yaml").read_text()

    wanted = throughput(spec.http.request_timeout_s, cores=8)

    for name, value in wanted.items():
        if not name.endswith("DRAINING_PERIOD_S"):
            assert f'{{name: {name}, value: "{value}"}}' in text


def test_a_head_has_its_deadline_in_the_service_as_in_a_start_of_our_own() -> None:
    spec = load_spec(INFRA.parent / "serve" / "cluster.yaml")
    assert isinstance(spec, ServeSpec)
    manifest = yaml.safe_load((INFRA / "rayservice.yaml").read_text())
    container = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    given = {row["name"]: row.get("value") for row in container["env"]}

    wanted = haproxy_lines(spec.slow_clients.header_timeout_s)

    assert given["RAY_SERVE_HAPROXY_RETRY_ON"] == wanted["RAY_SERVE_HAPROXY_RETRY_ON"]
    module, _, name = given["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
