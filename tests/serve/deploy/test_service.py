"""The application that KubeRay and `serve deploy` build from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tigerbot.errors import ModelError, ServeError, SpecError
from tigerbot_serve.deploy import application


def spec_file(folder: Path, **fields: Any) -> str:
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"kind": "serve", "name": "s", "members": {"creative": "/nowhere"}} | fields))
    return str(path)


def test_the_application_of_a_spec_starts_new_replicas_first_and_drains_longer_than_an_answer(
    world: Any, tmp_path: Path
) -> None:
    members = {"creative": str(world.creative_full)}

    built = application({"spec": spec_file(tmp_path, members=members, http={"request_timeout_s": 90})})

    config = built._bound_deployment._deployment_config
    assert config.max_surge_percent == 100
    assert config.graceful_shutdown_timeout_s > 90 + 35


@pytest.mark.parametrize("args", [{}, {"spec": 3}, {"spec": "x", "more": 1}])
def test_arguments_that_are_no_file_are_one_line(args: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="wants one field, spec"):
        application(args)


def test_what_cannot_be_served_is_said_where_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIGER_API_KEYS", raising=False)

    with pytest.raises(ModelError, match="no such folder"):
        application({"spec": spec_file(tmp_path)})
    with pytest.raises(ServeError, match="would answer everybody"):
        application({"spec": spec_file(tmp_path, http={"host": "0.0.0.0"})})
