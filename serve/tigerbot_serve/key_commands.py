"""`tiger keys new|list|revoke`: the keys of an endpoint, in a file that `http.keys_file` names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(
    no_args_is_help=True,
    help="API keys of an endpoint, in a key file. Example: tiger keys new --user alice --file keys.yaml",
)

KeyFileOption = Annotated[Path, typer.Option("--file", metavar="FILE", help="the key file, YAML or .json")]


@keys_app.command("new")
def keys_new(
    user: Annotated[str, typer.Option("--user", help="whose key it is; two may be live at a time")],
    file: KeyFileOption = Path("keys.yaml"),
    expires: Annotated[str | None, typer.Option("--expires", help="90d, 12h, 4w or a date; never if left out")] = None,
    scopes: Annotated[
        str, typer.Option("--scopes", help="of chat, embeddings, files, admin; comma-separated")
    ] = "chat,embeddings",
) -> None:
    """Make a key and show it once. Example: tiger keys new --user alice --expires 90d --file keys.yaml"""
    from tigerbot_serve.gateway.key_file import new_key

    named = tuple(scope.strip() for scope in scopes.split(",") if scope.strip())
    entry, secret = new_key(file, user, expires=expires, scopes=named)
    until = f"until {entry.expires:%Y-%m-%d %H:%M} UTC" if entry.expires else "without expiry"
    # The secret alone is on stdout, so that `KEY=$(tiger keys new ...)` works.
    print(f"key {entry.id} of {entry.user}, {until}, for {', '.join(entry.scopes)}. Shown once:", file=sys.stderr)
    print(secret)


@keys_app.command("list")
def keys_list(file: KeyFileOption = Path("keys.yaml")) -> None:
    """Show ids, users, expiry and scopes. Example: tiger keys list --file keys.yaml"""
    from datetime import UTC, datetime

    from tigerbot_serve.gateway.key_file import read_key_file

    now = datetime.now(UTC)
    for key in read_key_file(file).keys:
        state = "revoked" if key.revoked else "live" if key.live(now) else "expired"
        until = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "never"
        print(f"{key.id:14} {state:8} expires {until:17} {','.join(key.scopes):24} {key.user}")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID")],
    file: KeyFileOption = Path("keys.yaml"),
) -> None:
    """Take a key back, within a second on every replica. Example: tiger keys revoke 1f6c02a9d3b4 --file keys.yaml"""
    from tigerbot_serve.gateway.key_file import revoke_key

    print(f"key {revoke_key(file, key_id).id} is revoked")
