import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    # Names and versions only: an address or a path would hold on one machine alone.
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def wanted(requirements, environment):
    """Direct requirements, with our own extras taken apart."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if requirement.name == "mosaicjax":
            for extra in requirement.extras:
                yield from wanted(PROJECT["optional-dependencies"][extra], environment)
        else:
            yield requirement


@pytest.mark.parametrize("minor", ["3.11", "3.12", "3.13"])
def test_lock_satisfies_the_project(minor):
    pins = locked(ROOT / "locks" / f"py{minor.replace('.', '')}.txt")
    asked = [*PROJECT["dependencies"], "mosaicjax[dev]"]
    for requirement in wanted(asked, {"python_version": minor}):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not locked for Python {minor}: make lock"
        assert requirement.specifier.contains(pin), f"{requirement} is locked at {pin}: make lock"


def test_every_supported_python_has_a_lock():
    classifiers = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert {path.stem for path in (ROOT / "locks").glob("*.txt")} == {
        f"py{minor.replace('.', '')}" for minor in classifiers
    }
