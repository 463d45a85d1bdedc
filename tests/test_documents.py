"""What the documents refer to exists: files, functions, make targets, packages, the version."""

import ast
import re
import tomllib

import pytest
import yaml

import siglit
from tests.conftest import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "cache" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / ".github" / "pull_request_template.md",
]
_LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")


def _links(document):
    """(text, target) of the links of a document whose targets are files, without the part after #."""
    found = _LINK.findall(document.read_text())
    return [(text, target.partition("#")[0]) for text, target in found if not re.match(r"\w+:|#", target)]


def _definitions(path):
    """Names that a Python file defines: functions, classes, `Class.method`, and what it assigns at the top level."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(document):
    missing = [target for _, target in _links(document) if not (document.parent / target).exists()]
    assert not missing, f"{document.relative_to(ROOT)} links to files that do not exist: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_functions_are_defined_in_the_file_they_link_to(document):
    """For links such as [`open_source`](../siglit/data/sources.py); a path as the text is no name."""
    wrong = []
    for text, target in _links(document):
        name = re.fullmatch(r"`([A-Za-z_][\w.]*)(?:\(\))?`", text)
        if name and target.endswith(".py") and name[1] not in _definitions(document.parent / target):
            wrong.append(f"{name[1]} is not in {target}")
    assert not wrong, f"{document.relative_to(ROOT)}: {wrong}"


def test_the_walkthrough_is_short_and_links_to_functions_of_every_step():
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    assert len(text.splitlines()) <= 150
    packages = {target.split("/")[2] for _, target in _links(ROOT / "docs" / "walkthrough.md") if "siglit/" in target}
    assert packages >= {"commands", "data", "models", "cache", "runs", "training", "loss", "evaluation", "reporting"}


def test_code_paths_in_the_documents_exist():
    """`siglit/…`, `tests/…` and the like in code, also without a link."""
    missing = []
    for document in DOCUMENTS:
        for path in re.findall(r"`((?:siglit|configs|tests|scripts|benchmarks|docs)/[\w./-]+)`", document.read_text()):
            if not (ROOT / path).exists():
                missing.append(f"{document.relative_to(ROOT)}: {path}")
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_layout_names_every_package(document):
    """And nothing that is not there."""
    text = (ROOT / document).read_text()
    packages = {path.parent.name for path in (ROOT / "siglit").glob("*/__init__.py")}
    if document == "README.md":
        tree = text.partition("```\nsiglit/\n")[2].partition("```")[0]
        named = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    else:
        named = set(re.findall(r"^\| `siglit/(\w+)/`", text, re.MULTILINE))
    assert named == packages | {"assets"}


def test_contributing_shows_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [set(re.findall(r"\w+", layer)) for layer in contracts[0]["layers"]]
    rows = re.findall(r"^\| \d+ \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == layers


def test_make_targets_in_documents_and_ci_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set()
    for path in [*DOCUMENTS[:2], ROOT / ".ci" / "run", ROOT / ".pre-commit-config.yaml"]:
        for words in re.findall(r"(?:^|`|: )make ((?:[a-z-]+ ?)+)", path.read_text(), re.MULTILINE):
            used |= set(words.split())
    steps = [step for job in _workflow()["jobs"].values() for step in job["steps"] if "run" in step]
    used |= {word for step in steps for word in step["run"].split()[1:] if "=" not in word}
    assert used - {"and"} <= targets
    assert {"lint", "types", "imports", "test", "test-slow", "test-latest", "wheel"} <= used


def _workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_commit_hooks_are_local_and_the_same_as_the_linters_of_ci():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook["entry"].removeprefix("make ") for repo in config["repos"] for hook in repo["hooks"]]
    runs = [step.get("run", "") for step in _workflow()["jobs"]["checks"]["steps"]]
    assert f"make {' '.join(hooks)} PYTHON=python" in runs


def test_ci_uses_only_the_official_actions():
    for job in _workflow()["jobs"].values():
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_the_citation_has_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == siglit.__version__
    assert citation["title"] == "siglit"
