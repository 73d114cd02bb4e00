"""Members named by an alias of the registry: found at the deploy, followed when it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import InputError, TrackingError
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.scale import aliases
from tigerbot_serve.scale.aliases import Follower, with_folders


def serve_spec(factual: str, **fields: Any) -> ServeSpec:
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "/c", "factual": factual}} | fields)
    assert isinstance(spec, ServeSpec)
    return spec


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where aliases point; an empty one does not answer."""
    places = {"factual": Path("/models/1")}

    def resolve(uri: str, names: Any) -> dict[str, Path]:
        if not places:
            raise TrackingError("does not answer", where=uri)
        return {name: places[name] for name in names}

    monkeypatch.setattr(aliases, "resolve_aliases", resolve)
    return places


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_alias_is_the_folder_it_points_at(registry: dict[str, Path]) -> None:
    found = with_folders(serve_spec("models:/tiger@factual"))

    assert (found.members.creative, found.members.factual) == ("/c", "/models/1")


@pytest.mark.parametrize("name", ["models:/tiger", "models:/other@factual", "models:/tiger/3"])
def test_a_name_that_is_no_alias_of_ours_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"members.factual: got"):
        with_folders(serve_spec(name))


def test_the_canarys_members_are_named_and_followed_as_the_rests_are(registry: dict[str, Path]) -> None:
    registry["next"] = Path("/models/2")
    canary = {"members": {"creative": "models:/tiger@next", "factual": "models:/tiger@factual"}}
    spec = serve_spec("models:/tiger@factual", canary=canary, follow=True)

    found = with_folders(spec)
    assert found.members == spec.members.model_copy(update={"factual": "/models/1"})
    assert found.canary is not None
    assert (found.canary.members.creative, found.canary.members.factual) == ("/models/2", "/models/1")

    follower = Follower(spec, every_s=0.01)
    wait_until(lambda: follower._seen is not None)
    registry["next"] = Path("/models/3")
    wait_until(follower.moved)
    follower.close()


def test_an_alias_of_the_canary_that_is_none_of_ours_names_its_field() -> None:
    canary = {"members": {"creative": "models:/other@next"}}

    with pytest.raises(InputError, match=r"canary\.members\.creative: got"):
        with_folders(serve_spec("/f", canary=canary))


def test_an_alias_that_moves_is_noticed_once(registry: dict[str, Path]) -> None:
    follower = Follower(serve_spec("models:/tiger@factual", follow=True), every_s=0.01)
    wait_until(lambda: follower._seen is not None)
    assert not follower.moved()

    registry["factual"] = Path("/models/2")

    wait_until(follower.moved)
    assert not follower.moved()
    follower.close()


def test_a_registry_that_is_away_is_said_and_waited_for(registry: dict[str, Path]) -> None:
    places = dict(registry)
    registry.clear()
    follower = Follower(serve_spec("models:/tiger@factual", follow=True), every_s=0.01)
    wait_until(lambda: "does not answer" in follower.trouble)

    registry.update(places)

    wait_until(lambda: not follower.trouble)
    assert not follower.moved()
    follower.close()


def test_nothing_is_followed_unless_asked(registry: dict[str, Path]) -> None:
    follower = Follower(serve_spec("models:/tiger@factual"), every_s=0.01)

    assert follower._thread is None and not follower.moved()
