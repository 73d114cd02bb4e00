"""A second `tiger serve` and the process that keeps the endpoint meet in the run's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import InputError, ModelError, ServeError
from tigerbot.runs import hold_folder, open_run, read_json
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.deploy.checks import check_update, version_of
from tigerbot_serve.deploy.handover import hand_over, take_update
from tigerbot_serve.gateway.keys import KeyRing


def serve_spec(storage: Path | str = "x", **fields: Any) -> ServeSpec:
    raw = {"kind": "serve", "name": "s", "members": {"creative": "x"}, "storage": {"uri": str(storage)}}
    spec = parse_spec(raw | fields)
    assert isinstance(spec, ServeSpec)
    return spec


def handed(folder: Path, update: Callable[[ServeSpec], str], spec: ServeSpec) -> str:
    """What `hand_over` says while a keeper takes updates in this folder."""
    lock, ended = hold_folder(folder), threading.Event()

    def keep() -> None:
        while not ended.wait(0.02):
            take_update(folder, update)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        return hand_over(spec, folder, deadline_s=60)
    finally:
        ended.set()
        keeper.join()
        lock.close()


def test_the_keeper_makes_the_update_and_the_other_hears_of_it(tmp_path: Path) -> None:
    spec = serve_spec(model_name="new")

    said = handed(tmp_path, lambda asked: f"now {asked.model_name}", spec)

    assert said == "now new"


@pytest.mark.parametrize(("error", "heard"), [(ModelError, InputError), (ServeError, ServeError)])
def test_an_update_that_fails_is_told_to_who_asked_with_its_exit_status(
    tmp_path: Path, error: type[ModelError], heard: type[Exception]
) -> None:
    def fail(_: ServeSpec) -> str:
        raise error("is damaged", where="members.creative", fix="copy it again")

    with pytest.raises(heard, match=r"members.creative: is damaged \(the old version serves on\); copy it again"):
        handed(tmp_path, fail, serve_spec())


def test_a_keeper_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    hold_folder(tmp_path).close()

    with pytest.raises(ServeError, match="its process ended"):
        hand_over(serve_spec(), tmp_path, deadline_s=60)
    assert not (tmp_path / "update.json").exists()


def test_nothing_is_taken_where_nothing_was_asked(tmp_path: Path) -> None:
    assert take_update(tmp_path, lambda _: "never") is None


def test_an_endpoint_is_what_its_spec_says_today(tmp_path: Path) -> None:
    open_run(serve_spec(tmp_path)).close()
    run = open_run(serve_spec(tmp_path, model_name="other"))

    run.become(serve_spec(tmp_path, model_name="third"))
    run.close()

    assert read_json(tmp_path / "s" / "spec.json", {})["spec"]["model_name"] == "third"


def test_its_address_stays_while_it_runs() -> None:
    with pytest.raises(InputError, match=r"http.port: is 8000 while s runs, got 8001"):
        check_update(serve_spec(), serve_spec(http={"port": 8001}))
    check_update(serve_spec(http={"port": 8001}), serve_spec(http={"port": 0}))


def test_a_version_is_what_a_replica_is_made_of_and_not_how_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    members = {"creative": str(tmp_path)}
    one = version_of(serve_spec(members=members), KeyRing())

    assert version_of(serve_spec(members=members, scale={"replicas": [1, 5]}), KeyRing()) == one
    assert version_of(serve_spec(members=members, dial={"default": 0.9}), KeyRing()) != one
    assert version_of(serve_spec(members=members), KeyRing((b"key",))) != one
    (tmp_path / "config.json").write_text("{ }")
    assert version_of(serve_spec(members=members), KeyRing()) != one
