"""What a newcomer installs: constraints.txt against what pyproject.toml declares."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def _locked():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_lock_holds_names_and_exact_versions_only():
    """No address of an index or a file: whoever installs uses the index that is configured where they are."""
    for requirement in _locked():
        assert requirement.url is None
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement


def test_the_lock_has_an_allowed_version_of_every_declared_package():
    """Of all extras; after a change of pyproject.toml, `make lock` resolves anew."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    locked = {}
    for requirement in _locked():
        locked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    for requirement in map(Requirement, declared):
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is not in constraints.txt; run `make lock`"
        for version in versions:
            (pinned,) = version.specifier
            assert requirement.specifier.contains(pinned.version, prereleases=True), f"{version} is not {requirement}"
