"""What the package imports and offers is declared: dependencies in pyproject.toml, public names for type checkers."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import trim_plugin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trim_plugin"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Distributions that are called otherwise than what is imported from them.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
#: The extra that brings what a module imports beyond the dependencies.
EXTRAS = {
    "kv_formats": "quantization",
    "integrations/bitsandbytes": "quantization",
    "integrations/peft": "peft",
    "integrations/adapters": "peft",
    "integrations/ray": "ray",
    "integrations/ray_serve": "ray",
    "commands/serve": "serve",
    "serving": "serve",
}
#: Programs that load a module of ours by themselves, and bring what it needs.
GUESTS = {"integrations/lmms_eval": {"lmms_eval", "tqdm"}, "integrations/lmms_eval_manifest": {"lmms_eval"}}


def names_of(requirements: list[str]) -> set[str]:
    """Distributions that requirements name, without versions and extras."""
    return {re.match(r"[A-Za-z0-9._-]+", one)[0].lower().replace("_", "-") for one in requirements}


def imported(source: str) -> set[str]:
    """Distributions of all that a module imports, wherever the import stands, but for Python's own and the package's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    outside = found - set(sys.stdlib_module_names) - {"trim_plugin", "benchmarks", "tests", ""}
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in outside}


def undeclared(module: str, source: str) -> set[str]:
    """What a module of the package imports that neither dependencies nor its extra bring."""
    extra = next((EXTRAS[name] for name in (module, module.partition("/")[0]) if name in EXTRAS), None)
    declared = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"].get(extra, [])
    guest = {name.replace("_", "-") for name in GUESTS.get(module, ())}
    return imported(source) - names_of(declared) - guest


def modules() -> dict[str, str]:
    """Sources of the package by their paths without the suffix."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }


def test_every_import_of_the_package_is_declared():
    missing = {module: undeclared(module, source) for module, source in modules().items()}
    assert {module: names for module, names in missing.items() if names} == {}


def test_every_import_of_tests_and_benchmarks_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    brought = [name for extra in ("quantization", "peft", "serve", "test", "ray") for name in extras[extra]]
    # Ray and transformers bring the first two; the last is invented where it is tested.
    others = {"pyarrow", "tokenizers", "lmms-eval"}
    declared = names_of(PROJECT["project"]["dependencies"] + brought) | others
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    missing = {str(path): imported(path.read_text(encoding="utf-8")) - declared for path in paths}
    assert {path: names for path, names in missing.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("cache/held", "def f():\n    from bitsandbytes import functional", {"bitsandbytes"}),
        ("kv_formats", "def f():\n    from bitsandbytes import functional", set()),
        ("cache/held", "import torch, yaml.nodes\nfrom PIL import Image\nimport trim_plugin.cache", {"pyyaml"}),
        ("serving/app", "from starlette import requests", set()),
        ("planning/table", "from starlette import requests", {"starlette"}),
    ],
)
def test_what_is_not_declared_is_found(module, source, expected):
    assert undeclared(module, source) == expected


def test_what_stands_in_the_tables_is_there():
    assert {name for name in (*EXTRAS, *GUESTS) if not (PACKAGE / name).with_suffix(".py").is_file()} == {"serving"}
    assert (PACKAGE / "serving").is_dir()


def test_public_names_are_the_same_for_python_and_for_type_checkers():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.name: node.module.removeprefix("trim_plugin.")
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        for alias in node.names
    }
    assert shown == trim_plugin._MODULES
    assert {*shown, "register", "unregister"} == set(trim_plugin.__all__)
    # A function `__getattr__` that type checkers see would make every name right.
    assert not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
    with pytest.raises(AttributeError, match="module 'trim_plugin' has no attribute 'KCentre'"):
        _ = trim_plugin.KCentre


def test_what_is_pinned_is_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names_of([line for line in lines if line and not line.startswith("#")])
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = names_of(PROJECT["project"]["dependencies"] + [name for extra in extras for name in extra])
    assert declared - pinned == {"trim-plugin"}


def test_the_package_is_found_with_its_types():
    assert (PACKAGE / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["trim_plugin"]
    assert importlib.metadata.version("trim-plugin") == trim_plugin.__version__


def test_the_version_is_written_alike_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["version"], cited[1], newest[1]} == {trim_plugin.__version__}
