"""Keys in a file: made, listed and revoked by the command, let in by the ring, read again while it serves."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tigerbot.errors import InputError
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.key_file import KeyFile, new_key, read_key_file, revoke_key
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.key_commands import keys_app


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC).timestamp()

    def __call__(self) -> float:
        return self.now


def refusal(ring: KeyRing, secret: str, scope: str | None = None) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        ring.check(f"Bearer {secret}", scope)
    return refused.value.status, refused.value.code


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_new_key_is_shown_once_and_only_its_digest_is_kept(tmp_path: Path, name: str):
    path = tmp_path / name
    made = CliRunner().invoke(
        keys_app, ["new", "--user", "alice", "--expires", "90d", "--scopes", "chat,admin", "--file", str(path)]
    )
    secret = made.stdout.strip().splitlines()[-1]

    text = path.read_text()
    entry = read_key_file(path).keys[0]

    assert secret not in text and secret.rpartition("-")[2] not in text
    assert entry.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    assert entry.expires is not None and 89 < (entry.expires - datetime.now(UTC)).days + 1 <= 91
    key = KeyRing(file=path).check(f"Bearer {secret}", "admin")
    assert (key.user, key.id) == ("alice", entry.id)
    listed = CliRunner().invoke(keys_app, ["list", "--file", str(path)]).stdout
    assert entry.id in listed and "live" in listed and "alice" in listed and secret not in listed


def test_two_keys_of_a_user_live_at_a_time_so_that_one_can_replace_the_other(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    (old, old_secret), (_, new_secret) = (new_key(path, "bob", expires=None, scopes=("chat",)) for _ in range(2))

    with pytest.raises(InputError, match=f"user bob has 2 live keys already: {old.id}"):
        new_key(path, "bob", expires=None, scopes=("chat",))
    revoke_key(path, old.id)
    new_key(path, "bob", expires=None, scopes=("chat",))

    ring = KeyRing(file=path)
    assert refusal(ring, old_secret) == (401, "invalid_api_key")
    assert ring.check(f"Bearer {new_secret}").user == "bob"
    assert [key.revoked is not None for key in read_key_file(path).keys] == [True, False, False]


def test_a_key_is_refused_after_its_expiry_and_beyond_its_scopes(tmp_path: Path):
    path, clock = tmp_path / "keys.yaml", Clock()
    _, secret = new_key(path, "eve", expires="2h", scopes=("embeddings",))
    ring = KeyRing(file=path, clock=clock)

    assert ring.check(f"Bearer {secret}", "embeddings").user == "eve"
    assert refusal(ring, secret, "chat") == (403, "insufficient_permissions")
    clock.now += 3 * 3600
    assert refusal(ring, secret, "embeddings") == (401, "invalid_api_key")


def test_an_id_that_is_known_does_not_open_without_its_secret(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    entry, secret = new_key(path, "eve", expires=None, scopes=("chat",))
    ring = KeyRing((hashlib.sha256(b"fixed").digest(),), file=path)

    for wrong in (f"sk-tiger-{entry.id}-", f"sk-tiger-{entry.id}", secret[:-1], secret + "x", "sk-tiger--", "fixed "):
        if wrong.strip() != "fixed":
            assert refusal(ring, wrong) == (401, "invalid_api_key")
    assert ring.check("Bearer fixed").id == hashlib.sha256(b"fixed").hexdigest()[:8]


def test_the_file_is_read_again_while_it_serves_and_a_broken_one_changes_nothing(tmp_path: Path, caplog):
    path, clock = tmp_path / "keys.yaml", Clock()
    entry, secret = new_key(path, "ann", expires=None, scopes=("chat",))
    ring = pickle.loads(pickle.dumps(KeyRing(file=path)))  # as it travels to a replica
    ring._clock = clock

    path.write_text("keys: [{id: 1")
    clock.now += 2
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert ring.check(f"Bearer {secret}").user == "ann"
            clock.now += 2
    assert [record.message.count("stay in force") for record in caplog.records] == [1]

    ring.check(f"Bearer {secret}")
    path.write_text(yaml.safe_dump(KeyFile(keys=(entry,)).model_dump(mode="json")))
    _, other = new_key(path, "ben", expires=None, scopes=("chat",))
    revoke_key(path, entry.id)
    assert refusal(ring, other)[0] == 401, "it looks no more than once a second"
    clock.now += 2
    assert ring.check(f"Bearer {other}").user == "ben"
    assert refusal(ring, secret) == (401, "invalid_api_key")


def test_a_file_whose_last_key_was_revoked_does_not_open_the_door(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    entry, secret = new_key(path, "ann", expires=None, scopes=("chat",))
    revoke_key(path, entry.id)

    assert refusal(KeyRing(file=path), secret)[0] == 401


SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [", "is not YAML at line"),
        ("keys: [{id: abcd1, user: a}]", "keys.0.sha256"),
        (f"keys: [{{id: abcd1, user: a, sha256: '{SHA}', scopes: [chta]}}]", "keys.0.scopes.0"),
        (f"keys: [{{id: abcd1, user: a, sha256: '{SHA}', secret: sk-oops}}]", "keys.0.secret"),
        (f"keys: [{', '.join([f'{{id: abcd1, user: a, sha256: {SHA!r}}}'] * 2)}]", "id abcd1 is there twice"),
        (
            "keys: [{}]".format(", ".join(f"{{id: abcd{i}, user: a, sha256: '{SHA}'}}" for i in range(3))),
            "user a has more than 2 live keys",
        ),
        (
            f"keys: [{{id: abcd1, user: a, sha256: '{SHA}', limits: {{budget: {{tokens: 5, money: 1}}}}}}]",
            "wants one of tokens and money",
        ),
        ("format_version: 2", "format_version"),
    ],
)
def test_a_mistake_in_a_key_file_is_one_line_that_quotes_no_value(tmp_path: Path, text: str, says: str):
    path = tmp_path / "keys.yaml"
    path.write_text(text)

    with pytest.raises(InputError) as wrong:
        read_key_file(path)

    assert says in str(wrong.value) and str(path) in str(wrong.value)
    assert "sk-oops" not in str(wrong.value) and "\n" not in str(wrong.value)


def test_times_without_a_zone_are_utc_and_dates_begin_at_midnight(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"keys:\n- {{id: abcd1, user: a, sha256: '{SHA}', expires: 2031-05-01}}\n"
        f"- {{id: abcd2, user: b, sha256: '{SHA}', expires: 2031-05-01 00:00:00}}\n"
        f"- {{id: abcd3, user: c, sha256: '{SHA}', expires: '2031-05-01T02:00:00+02:00'}}\n"
    )

    expires = {key.expires for key in read_key_file(path).keys}

    assert expires == {datetime(2031, 5, 1, tzinfo=UTC)}


def test_commands_that_make_keys_at_the_same_time_lose_none(tmp_path: Path):
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: new_key(path, f"u{i}", expires=None, scopes=("chat",)), range(8)))

    assert {key["user"] for key in json.loads(path.read_text())["keys"]} == {f"u{i}" for i in range(8)}


@pytest.mark.parametrize("expires", ["yesterday", "2020-01-01", "0x", "999999w"])
def test_an_expiry_that_is_none_is_refused(tmp_path: Path, expires: str):
    with pytest.raises(InputError, match="--expires"):
        new_key(tmp_path / "k.yaml", "a", expires=expires, scopes=("chat",))
