"""The rooms of the package and the one way in which they import each other: their order is written here alone."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trim_plugin"

#: From the top down: a room imports from rooms below it, never from one above. Single modules at the top level are rooms too.
ORDER = (
    "integrations",
    "cli",
    "commands",
    "evaluation",
    "serving",
    "batching",
    "engine",
    "asking",
    "variants",
    "embedded",
    "pictures",
    "planning",
    "generation",
    "forward",
    "cache",
    "config",
    "kv_formats",
    "selection",
    "durable",
    "deferred",
    "contract",
    "compat",
    "arithmetic",
)
#: Modules that no test imports and that have no test file of their own: what they do shows elsewhere.
TESTED_IN = {
    "integrations.adapters": "integrations/test_peft.py",
    "integrations.custom_generate.custom_generate.generate": "integrations/test_custom_generate.py",
    "serving.answering": "serving/test_found.py",
    "serving.answers": "serving/test_app.py",
    "serving.metrics": "serving/test_app.py",
    "engine.reading": "engine/test_engine.py",
    "engine.scheduler": "engine/test_engine.py",
    "serving.sources": "serving/test_app.py",
    "cache.joining": "exactness/test_pieces.py",
    "planning.table": "commands/test_plan.py",
    "evaluation.alone": "evaluation/test_together.py",
    "commands.generate": "integrations/test_generate_command.py",
    "forward.tower_weights": "pictures/test_adapters.py",
    "pictures.encoding": "pictures/test_encoded.py",
    "forward.detaching": "forward/test_hooks.py",
}
MOST_LINES = 350
#: Of a room; integrations are as many as there are libraries.
MOST_MODULES = 10


@dataclasses.dataclass(frozen=True)
class Import:
    """One module of the package importing another."""

    source: str
    target: str
    how: str  # "at the top", "in a function" or "for types"

    def __str__(self) -> str:
        return f"{self.source} imports {self.target} ({self.how})"


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name without the package's own."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(package: Path) -> list[Import]:
    """Every import of a package's module by another one, wherever it stands."""
    known = modules(package)
    found = []
    for name, path in known.items():
        for node, how in _statements(ast.parse(path.read_text(encoding="utf-8")), "at the top"):
            for target in _targets(node, package.name, known):
                if target != name:
                    found.append(Import(name, target, how))
    return found


def _statements(node: ast.AST, how: str):
    for child in ast.iter_child_nodes(node):
        inner = how
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "in a function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            inner = "for types"
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inner
        yield from _statements(child, inner)


def _targets(node: ast.Import | ast.ImportFrom, package: str, known: dict[str, Path]):
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used in the package"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = [alias.name for alias in node.names]
    for name in names:
        if name == package or name.startswith(package + "."):
            inner = name.removeprefix(package).lstrip(".")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


def room(module: str) -> str:
    return module.split(".")[0]


def problems(package: Path) -> list[str]:
    """What breaks the order: arrows that run up or aside, circles, integrations."""
    found = []
    graph: dict[str, set[str]] = {}
    for one in imports(package):
        if room(one.target) == "integrations" != room(one.source):
            found.append(f"{one}: integrations import trim_plugin, never the reverse")
            continue
        graph.setdefault(one.source, set()).add(one.target)
        here, there = room(one.source), room(one.target)
        if here in ORDER and there in ORDER and ORDER.index(there) < ORDER.index(here):
            found.append(f"{one}: {there} lies above {here}")
    found += [f"circle: {' → '.join(circle)}" for circle in circles(graph)]
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One way round for every circle that a depth-first walk meets."""
    found, done, path = [], set(), []

    def walk(name: str) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            path.append(name)
            for target in sorted(graph.get(name, ())):
                walk(target)
            done.add(path.pop())

    for name in sorted(graph):
        walk(name)
    return found


def test_imports_go_one_way():
    assert problems(PACKAGE) == []


def test_every_module_lies_in_a_room():
    assert {room(name) for name in modules(PACKAGE) if name} <= set(ORDER)


@pytest.mark.parametrize("name", sorted({room(name) for name in modules(PACKAGE) if name}))
def test_rooms_stay_small(name):
    own = {module: path for module, path in modules(PACKAGE).items() if room(module) == name}
    if name != "integrations":
        assert len([path for path in own.values() if path.name != "__init__.py"]) <= MOST_MODULES
    long = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in own.items()}
    assert {module: lines for module, lines in long.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("selection/one.py", "from trim_plugin.cache import held", "cache lies above selection"),
        (
            "selection/one.py",
            "def f():\n    import trim_plugin.cache.held",
            "(in a function): cache lies above selection",
        ),
        (
            "selection/one.py",
            "if TYPE_CHECKING:\n    from trim_plugin.cache.held import Held",
            "(for types): cache lies above selection",
        ),
        ("cache/held.py", "from trim_plugin.cache import other", "circle: cache.held → cache.other → cache.held"),
        ("cli.py", "def f():\n    from trim_plugin.integrations.peft import x", "integrations import trim_plugin"),
        ("cli.py", "import trim_plugin.integrations.peft", "integrations import trim_plugin, never the reverse"),
        ("selection/one.py", "from trim_plugin.integrations import peft", "integrations import trim_plugin"),
    ],
)
def test_what_breaks_the_order_is_found(tmp_path, file, text, message):
    package = tmp_path / "trim_plugin"
    start = {
        "__init__.py": "",
        "cli.py": "",
        "selection/__init__.py": "",
        "selection/one.py": "",
        "cache/__init__.py": "",
        "cache/held.py": "from trim_plugin.selection import one\nclass Held: ...",
        "cache/other.py": "from trim_plugin.cache.held import Held",
        "integrations/__init__.py": "",
        "integrations/peft.py": "from trim_plugin.integrations import adapters\nfrom trim_plugin import cli",
        "integrations/adapters.py": "from trim_plugin.cache.held import Held",
    }
    for name, content in {**start, file: text}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    assert any(message in problem for problem in problems(package))
    (package / file).write_text(start[file])
    assert problems(package) == []


def test_the_architecture_page_shows_the_same_order():
    page = (ROOT / "docs" / "explanation" / "call-flow.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- rooms -->(.*?)<!-- /rooms -->", page, re.DOTALL)
    assert shown is not None
    assert tuple(re.findall(r"^\| `([a-z_]+)", shown.group(1), re.MULTILINE)) == ORDER


def test_rooms_of_the_benchmarks_share_what_is_common_alone():
    shared = {"common", "small_model"}
    across = [
        str(one)
        for one in imports(ROOT / "benchmarks")
        if room(one.source) not in ("__main__", "report", room(one.target)) and room(one.target) not in shared
    ]
    assert across == []
    assert {room(one.target) for one in imports(ROOT / "benchmarks") if room(one.source) == "common"} == {"common"}


def imported_by_tests() -> set[str]:
    """The package's modules that tests import."""
    known, found = modules(PACKAGE), set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node, _ in _statements(ast.parse(path.read_text(encoding="utf-8")), "at the top"):
            if not (isinstance(node, ast.ImportFrom) and node.level):
                found.update(_targets(node, PACKAGE.name, known))
    return found


def test_every_module_has_its_tests():
    own = {name for name, path in modules(PACKAGE).items() if path.name != "__init__.py"}
    files = {
        name for name in own if (ROOT / "tests" / re.sub(r"(\w+)$", r"test_\1.py", name.replace(".", "/"))).is_file()
    }
    tested = files | imported_by_tests()
    missing = "give it a test file, import it in a test, or say in TESTED_IN where it is tested"
    assert own - tested - set(TESTED_IN) == set(), missing
    assert set(TESTED_IN) & tested == set(), "these need no entry"
    assert set(TESTED_IN) <= own, "these are gone"
    assert [file for file in TESTED_IN.values() if not (ROOT / "tests" / file).is_file()] == []


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "explanation" / "call-flow.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- rooms -->(.*?)<!-- /rooms -->", page, re.DOTALL)
    assert shown is not None
    rows = dict(re.findall(r"^\| `([a-z_]+)/?` \|(.*)$", shown.group(1), re.MULTILINE))
    names = {name: path for name, path in modules(PACKAGE).items() if "." in name and path.name != "__init__.py"}
    missing = [name for name in names if f"`{name.split('.')[-1]}`" not in rows[room(name)]]
    assert missing == [], "name them in the table of rooms on the architecture page"
