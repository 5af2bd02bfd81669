"""Prints what the Python that runs it has and lacks for `sharded_adadiag[EXTRAS]`.

    python launch/lacking.py examples,dev

The first line is its torch, as a requirement (`torch==2.13.0`); then follow the
requirements that are not met, a line each: `pip install` takes them all. Exit code 1 if
there is no torch to build on. Needs nothing but pip, packaging or setuptools.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def read_project() -> dict[str, Any]:
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as toml
    return toml.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]


def packaging(module: str) -> Any:
    """A module of `packaging`, which most environments have inside another package."""
    for place in ("packaging", "pip._vendor.packaging", "setuptools._vendor.packaging"):
        try:
            return importlib.import_module(f"{place}.{module}")
        except ModuleNotFoundError:
            continue
    raise SystemExit("neither packaging nor pip nor setuptools is installed")


def is_met(requirement: Any) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    # A vendor's 2.11.0a0+x counts as the 2.11 that it was built from.
    version = packaging("version").parse(found).base_version
    return requirement.specifier.contains(version)


def main() -> None:
    parse = packaging("requirements").Requirement
    project = read_project()
    needed = project["dependencies"]
    if not all(is_met(parse(text)) for text in needed):
        raise SystemExit(1)
    import torch  # one that cannot be imported is none

    print(f"torch=={torch.__version__}")
    for extra in filter(None, sys.argv[1].split(",")):
        for text in project["optional-dependencies"][extra]:
            if not is_met(parse(text)):
                print(text.replace(" ", ""))


if __name__ == "__main__":
    main()
