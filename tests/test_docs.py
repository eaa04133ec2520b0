"""The pages: their code runs as it is written, tutorials are notebooks too, and what they say holds."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

import trim_plugin
from benchmarks.common.results import read_result
from trim_plugin.compat import cache_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
_spec = importlib.util.spec_from_file_location("make_notebooks", DOCS / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_notebooks)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line numbers and sources of a page's python blocks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(page: Path) -> dict:
    namespace: dict = {"__name__": "page"}
    for line, source in blocks(page):
        # Empty lines before the block make tracebacks point into the page.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_run_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """On the small model, cell by cell as Jupyter does it: with that the tutorials' blocks have run as well."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)


def test_notebooks_are_made_from_the_tutorials():
    made = make_notebooks.made()
    assert set(made) == set((DOCS / "notebooks").glob("*.ipynb"))
    old = [path.name for path, text in made.items() if text != path.read_text(encoding="utf-8")]
    assert old == [], "make them again: python docs/make_notebooks.py"
    for path, text in made.items():
        page = (DOCS / "tutorials" / f"{path.stem}.md").read_text(encoding="utf-8")
        assert page.splitlines()[2] == make_notebooks.LINK.format(name=path.stem)
        code = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        real = [cell for cell in code if cell.startswith("# The real model")]
        assert len(real) == 1
        assert 'MODEL = "meta-llama/Llama-3.2-11B-Vision-Instruct"' in real[0]
        code.remove(real[0])
        assert code == [source.strip("\n") for _, source in blocks(DOCS / "tutorials" / f"{path.stem}.md")]


def test_links_of_notebooks_lead_somewhere():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
                assert (path.parent / target).is_file(), (path.name, target)


@pytest.mark.parametrize("page", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_names_its_model_once(page):
    sources = "\n".join(source for _, source in blocks(page))
    assert len(re.findall(r"^MODEL = ", sources, flags=re.MULTILINE)) == 1
    assert len(re.findall(r"meta-llama/", sources)) == 1
    assert "load_small_model" not in sources


def test_a_processor_written_by_the_guide_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run(DOCS / "guides" / "writing-a-processor.md")
    report = cache_of(page["output"]).report()
    assert 8 <= report.kept_tokens[0] < report.visible_tokens[0]
    again = page["model"].generate(
        **page["inputs"],
        max_new_tokens=2,
        return_dict_in_generate=True,
        cache_implementation="trimmed",
        cache_config={"processors": [page["TwoHeadsAgree"](minimum=8)]},
    )
    assert cache_of(again).kept_indices[0].equal(cache_of(page["output"]).kept_indices[0])


def test_pages_in_blocks_have_the_headings_that_the_style_sheet_shows():
    """`docs/assets/extra.css` writes the headings beside the cells of tables in `cards`."""
    style = (DOCS / "assets" / "extra.css").read_text(encoding="utf-8")
    headings = re.findall(r"\.cards td:nth-child\(\d\)::before \{ content: \"(.*?)\";", style)
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    shown = re.findall(r'<div class="cards" markdown>\n\n\| (.*?) \|\n', page)
    assert len(shown) == len(re.findall(r"^\| name \|", page, flags=re.M)) >= 4
    assert {tuple(line.split(" | ")) for line in shown} == {tuple(headings)}


def test_pages_use_the_presets_for_quantized_weights():
    """One preset, which `load` takes and the planner counts with: no page builds another one by hand."""
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        assert "load_in_4bit" not in page.read_text(encoding="utf-8"), page
    from trim_plugin.integrations.bitsandbytes import quantization_config

    assert quantization_config("nf4").bnb_4bit_use_double_quant


def test_the_same_answers_are_promised_of_exact_mode_alone():
    for page in (ROOT / "README.md", ROOT / "pyproject.toml", DOCS / "index.md"):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"the same answers?\b|same tokens", text):
            assert "xact" in text[max(0, match.start() - 300) : match.end() + 50], text[
                match.start() - 80 : match.end()
            ]


README = ROOT / "README.md"


def test_the_first_page_is_short_and_has_its_two_commands():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 460
    commands = re.findall(r"^```bash\n(.*?)\n```", text, flags=re.M | re.S)
    assert commands == [
        "pip install -c constraints.txt -e . && trim-plugin demo",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_example_of_the_first_page_runs_as_written(capsys):
    ((line, source),) = blocks(README)
    exec(compile("\n" * line + source, str(README), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip().endswith("eight")
    assert '"trimmed"' in source
    assert "do_sample=False,  # Llama draws at random" in source


def test_links_of_the_first_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("https:"):
            assert (ROOT / target.split("#")[0]).is_file(), target


def test_what_the_first_page_says_is_kept_was_measured():
    said = re.search(r"union keeps (\d+)–(\d+) % here", README.read_text(encoding="utf-8"))
    kept = [
        row["kept_share"]
        for name, where in (("quality", "fresh"), ("quality-fine", "fresh"), ("quality-pages", "evaluation"))
        for row in read_result(name)["rows"]
        if (row["where"], row["rule"], row["parameter"]) == (where, "paper, merged", 0.15)
    ]
    assert [f"{100 * share:.0f}" for share in (min(kept), max(kept))] == list(said.groups())


def test_every_test_that_the_page_on_compatibility_names_exists():
    rows = re.findall(r"^\| (?!what |---)(.+) \|$", (DOCS / "reference" / "compatibility.md").read_text("utf-8"), re.M)
    assert len(rows) >= 40
    for what, state, tests in (re.split(r" (?<!\\)\| ", row) for row in rows):
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert bool(named) != state.startswith("untested"), what
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


class _Loader(yaml.SafeLoader):
    """mkdocs.yml may hold tags of Python names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_every_page_is_in_the_navigation():
    # bandit: a SafeLoader that ignores tags
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    assert sorted(pages(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_reference_shows_every_public_name_by_that_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: trim_plugin\.(\w+)$", text, flags=re.M)) - {"embedded", "variants"}
    assert shown == set(trim_plugin.__all__)
