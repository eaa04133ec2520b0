"""Tables and plots from the results' JSON: docs/benchmarks.md between its markers, and docs/assets/*.png."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.common.results import read_result
from benchmarks.latency import compiled_report, first_token_report, merging_report
from benchmarks.latency import pieces_report as pieces_latency_report
from benchmarks.latency import report as latency_report
from benchmarks.memory import pieces_report
from benchmarks.memory import report as memory_report
from benchmarks.quality import encoded_report
from benchmarks.quality import report as quality_report

#: Marker in docs/benchmarks.md and name of the result → the module with its `tables` and `plots`.
SECTIONS: dict[str, Any] = {
    "quality": quality_report,
    "quality-fine": quality_report,
    "encoded": encoded_report,
    "memory": memory_report,
    "latency": latency_report,
    "compiled": compiled_report,
    "first_token": first_token_report,
    "merging": merging_report,
    "pieces": pieces_report,
    "pieces_latency": pieces_latency_report,
}
#: The same for pages of their own: what the module's `details` gives of every result of these names.
PAGES: dict[str, tuple[Any, dict[str, str]]] = {
    "quality-tables.md": (
        quality_report,
        {"quality": "The model that ships with the package", "quality-fine": "The finer model"},
    )
}


def write(results: Path, docs: Path) -> list[Path]:
    """Make everything that the results at hand allow; returns the files written."""
    assets = docs / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "".join(f"{_marker(n)}\n" for n in SECTIONS)
    written = []
    for name, section in SECTIONS.items():
        result = read_result(name, results)
        if result is None:
            continue
        text = _replaced(text, name, section.tables(result) + "\n" + _footer(result))
        written += section.plots(result, assets)
    page.write_text(text, encoding="utf-8")
    return [page, *written, *_pages(results, docs)]


def _pages(results: Path, docs: Path) -> list[Path]:
    written = []
    for file, (section, titles) in PAGES.items():
        found = {title: read_result(name, results) for name, title in titles.items()}
        parts = [
            f"## {title}\n\n{section.details(result)}\n{_footer(result)}" for title, result in found.items() if result
        ]
        if parts:
            (docs / file).write_text("\n".join([section.TITLE, *parts]), encoding="utf-8")
            written.append(docs / file)
    return written


def _marker(name: str) -> str:
    return f"<!-- begin {name} -->\n<!-- end {name} -->"


def _replaced(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    if not re.search(pattern, text, re.S):
        text += f"\n{_marker(name)}\n"
    return re.sub(pattern, lambda match: f"{match[1]}{content}{match[2]}", text, flags=re.S)


def _footer(result: dict[str, Any]) -> str:
    where = result["environment"]
    quick = " `--quick`: few cases, rough figures." if result["quick"] else ""
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    return (
        f"Measured {where['date']}: {where['cpu']}{gpu}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, bitsandbytes {where['bitsandbytes']}, peft {where['peft']}, seed {where['seed']}.{quick}\n"
    )
