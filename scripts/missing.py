"""Print an installed package's requirements that no installed package is named for, whatever its version.

    python scripts/missing.py PACKAGE [LEFT_OUT ...]

A requirement with extras is printed without a version where its package is installed, so that only they are added.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def missing(package: str, left_out: set[str]) -> list[str]:
    found = []
    for requirement in map(Requirement, requires(package) or ()):
        asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not asked or requirement.name in left_out:
            continue
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        if not _is_installed(requirement.name):
            found.append(f"{requirement.name}{extras}{requirement.specifier}")
        elif extras:
            found.append(requirement.name + extras)
    return found


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(missing(sys.argv[1], set(sys.argv[2:]))))
