"""Every verb explains itself with an example that it would take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tigerbot import cli

ROOT = Path(__file__).parents[2]
WITHOUT = {"tiger", "tiger spec"}  # they only hold other verbs


def verbs(command: Any, path: str = "tiger") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, f"{path} {name}")


@pytest.fixture(scope="module")
def root() -> Any:
    cli.add_verbs()
    return typer.main.get_command(cli.app)


def test_every_verb_has_an_example_that_it_takes(root: Any) -> None:
    for path, command in verbs(root):
        if path in WITHOUT:
            continue
        help_text = " ".join((command.help or "").split())
        assert ". Example: tiger " in help_text, path
        words = shlex.split(help_text.partition("Example: ")[2].partition(" > ")[0])
        depth = len(path.split())
        assert words[:depth] == path.split(), path
        command.make_context(path, words[depth:])  # raises for an option or argument that it does not take


def test_every_command_in_the_docs_is_one_that_exists(root: Any) -> None:
    known = {path for path, _ in verbs(root)}
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]

    for page in pages:
        for written in re.findall(r"(?:^|`|&& )(tiger [a-z][^`\n#]*)", page.read_text(encoding="utf-8"), re.M):
            verb = written.split()[1].split("|")[0]
            assert f"tiger {verb}" in known, f"{page.name}: {written}"
            for file in re.findall(r"\S+\.yaml", written):
                assert (ROOT / file).exists() or "*" in file, f"{page.name}: {file}"


def test_an_interrupted_verb_says_that_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tigerbot.listing.listed", interrupted)
    monkeypatch.setattr("sys.argv", ["tiger", "runs"])

    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capsys.readouterr().err == "tiger: interrupted; the same command goes on\n"
