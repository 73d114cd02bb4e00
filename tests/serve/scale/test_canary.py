"""A canary beside the rest in one replica: who goes there, what is counted, how it is taken back."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tigerbot.runs import read_json
from tigerbot.spec import CanarySpec, ServeSpec, parse_spec
from tigerbot_serve.deploy.watch import CanaryWatch
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.canary import Caller, TwoEngines, is_canary


def canary_spec(**fields: Any) -> CanarySpec:
    return CanarySpec.model_validate({"members": {"creative": "x"}, "percent": 50, "min_answers": 1} | fields)


@pytest.fixture
def engines(engine_of: Callable[..., Engine]) -> TwoEngines:
    return TwoEngines(engine_of("lora"), engine_of("alone"), canary_spec())


@pytest.fixture
def post_as(engines: TwoEngines) -> Callable[..., httpx.Response]:
    """Ask the gateway as somebody."""
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}})
    assert isinstance(spec, ServeSpec)
    app: Any = Caller(create_app(engines, spec, KeyRing()))

    async def post(user: str, **fields: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "tiger", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2, "user": user}
            return await client.post("/v1/chat/completions", json=body | {"verify": False} | fields)

    return lambda user, **fields: asyncio.run(post(user, **fields))


@pytest.fixture
def ask_as(post_as: Callable[..., httpx.Response]) -> Callable[[str], int]:
    """Ask the gateway as somebody; gives the status."""
    return lambda user: post_as(user).status_code


def test_a_share_of_the_callers_is_the_canarys_and_each_stays_where_it_is() -> None:
    callers = [f"caller-{index}" for index in range(5000)]
    sides = [is_canary(caller, "salt", 10.0) for caller in callers]

    assert 400 < sum(sides) < 600
    assert sides == [is_canary(caller, "salt", 10.0) for caller in callers]
    assert sides != [is_canary(caller, "other", 10.0) for caller in callers]
    assert all(is_canary(caller, "salt", 20.0) for caller, side in zip(callers, sides, strict=True) if side)


def test_users_of_one_key_go_to_both_sides_and_every_answer_is_counted(
    engines: TwoEngines, ask_as: Callable[..., int]
) -> None:
    assert {ask_as(f"user-{index}") for index in range(12)} == {200}

    canary, rest = engines.tallies["canary"], engines.tallies["rest"]
    assert canary.answers + rest.answers == 12
    assert canary.answers and rest.answers and not canary.errors
    assert len(canary.times) == canary.answers


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}], ids=["whole", "streamed", "two choices"])
def test_every_answer_says_by_which_version_it_was_given(
    engines: TwoEngines, post_as: Callable[..., httpx.Response], fields: dict[str, Any]
) -> None:
    before, given = 0, set()
    for index in range(12):
        answer = post_as(f"user-{index}", **fields).text
        fingerprint = re.findall(r'"system_fingerprint": ?"(fp_\w+)"', answer)
        now = engines.tallies["canary"].answers
        expected = engines.canary if now > before else engines.rest
        assert set(fingerprint) == {expected.fingerprint}
        before = now
        given |= set(fingerprint)

    assert given == {engines.canary.fingerprint, engines.rest.fingerprint} and len(given) == 2


def test_a_canary_that_is_taken_back_lends_its_name_to_nobody(
    engines: TwoEngines, post_as: Callable[..., httpx.Response]
) -> None:
    engines.take_back("for a test")

    said = {post_as(f"user-{index}").json()["system_fingerprint"] for index in range(6)}

    assert said == {engines.rest.fingerprint}


def test_a_canary_that_dies_is_taken_back_and_nobody_notices(engines: TwoEngines, ask_as: Callable[..., int]) -> None:
    engines.canary.stop()

    assert {ask_as(f"user-{index}") for index in range(6)} == {200}

    assert engines.taken_back == "its engine has died"
    assert engines.tallies["canary"].answers == 0


def endpoint(*reports: dict[str, Any]) -> Any:
    """An endpoint whose replicas report this, and hear what they are told."""
    told: list[str] = []

    def ask(method: str, *args: Any) -> list[Any]:
        if method == "take_back_canary":
            told.append(args[0])
            for report in reports:
                report["taken_back"] = args[0]
        return [json.loads(json.dumps(report)) for report in reports]

    spec = SimpleNamespace(canary=canary_spec(percent=10, min_answers=100))
    return SimpleNamespace(version=SimpleNamespace(id="v1", spec=spec), ask_replicas=ask, told=told)


def report(canary_errors: int, *, taken_back: str | None = None) -> dict[str, Any]:
    return {
        "taken_back": taken_back,
        "canary": {"answers": 100, "errors": canary_errors, "times": [0.01] * (100 - canary_errors)},
        "rest": {"answers": 1000, "errors": 2, "times": [0.01] * 998},
    }


def test_the_keeper_judges_all_replicas_together_tells_them_and_writes_it_down(tmp_path: Path) -> None:
    replicas = endpoint(report(6), report(6))
    watch = CanaryWatch(replicas, tmp_path, every_s=0.0)

    said = watch.look()

    assert said is not None and "errors 6.0% against 0.2%" in said
    assert len(replicas.told) == 1
    assert watch.look() is None and len(replicas.told) == 1
    assert "taken back (errors 6.0%" in watch.note
    kept = read_json(tmp_path / "canary.json", {})
    assert kept["canary"]["errors"] == 12 and kept["taken_back"]


def test_a_replica_that_comes_later_hears_of_the_decision(tmp_path: Path) -> None:
    replicas = endpoint(report(0, taken_back="p99"), report(0))

    CanaryWatch(replicas, tmp_path, every_s=0.0).look()

    assert replicas.told == ["p99"]


def test_a_good_canary_goes_on_and_its_numbers_are_shown(tmp_path: Path) -> None:
    watch = CanaryWatch(endpoint(report(0)), tmp_path, every_s=0.0)

    assert watch.look() is None
    assert watch.note == "canary 10%: 100 answers, 0 errors"
