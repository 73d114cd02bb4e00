"""The house: what may import what, how large a file is, which commands exist."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"tigerbot": ROOT / "platform", "tigerbot_jobs": ROOT / "jobs", "tigerbot_serve": ROOT / "serve"}
MAY_IMPORT = {"tigerbot": set(), "tigerbot_jobs": {"tigerbot"}, "tigerbot_serve": {"tigerbot"}}


def modules(package: str) -> list[Path]:
    return sorted((ROOMS[package] / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        others = imported(path) & (set(ROOMS) - {package})
        assert others <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in modules(package):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_source_roots_shadow_nothing() -> None:
    assert not [root for root in ROOMS.values() if (root / "__init__.py").exists()]


@pytest.mark.parametrize("group", ["tigerbot.kinds", "tigerbot.deployers", "tigerbot.commands", "tigerbot.previews"])
def test_every_entry_point_leads_somewhere(group: str) -> None:
    points = [point for point in importlib.metadata.entry_points(group=group) if point.value.startswith("tigerbot")]

    assert points and all(callable(point.load()) for point in points)


def test_help_imports_nothing_heavy() -> None:
    story = (
        "import sys; sys.argv = ['tiger', '--help']\n"
        "from tigerbot.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'transformers', 'numpy') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", story], capture_output=True, text=True, timeout=30)

    assert done.stdout.strip().splitlines()[-1] == "[]"
    for verb in (
        "run",
        "runs",
        "export",
        "submit",
        "jobs",
        "logs",
        "stop",
        "serve",
        "chat",
        "demo",
        "simulate",
        "doctor",
        "spec",
    ):
        assert f" {verb} " in done.stdout
