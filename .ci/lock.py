"""Print requirements.lock: a pin for all that pyproject.toml asks for, directly or not, as installed here.

What happens to be installed beside that gets no pin. Run by `make lock`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def asked_for(pyproject: dict) -> list[Requirement]:
    """What the project, its extras, its tools and its build need."""
    project = pyproject["project"]
    groups = [
        project["dependencies"],
        pyproject["build-system"]["requires"],
        *project.get("optional-dependencies", {}).values(),
        *pyproject.get("dependency-groups", {}).values(),
    ]
    return [Requirement(line) for group in groups for line in group]


def needs(requirement: Requirement) -> Iterator[Requirement]:
    """What one installed distribution asks for on this machine, with the extras that are wanted of it."""
    for line in distribution(requirement.name).requires or ():
        needed = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        if needed.marker is None or any(needed.marker.evaluate(each) for each in environments):
            yield needed


def pins(roots: list[Requirement]) -> list[str]:
    """`name==version` of everything reachable from the roots, sorted by name."""
    waiting, seen = list(roots), set()
    versions = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        versions[name] = distribution(name).version
        waiting.extend(needs(requirement))
    return sorted(f"{name}=={version}" for name, version in versions.items())


if __name__ == "__main__":
    print("\n".join(pins(asked_for(tomllib.loads((ROOT / "pyproject.toml").read_text())))))
