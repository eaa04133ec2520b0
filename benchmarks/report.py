"""Pages, plots and CSV files from the results' JSON: ``python -m benchmarks report``.

A page has markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. What lies between them is made here, so that no figure is
typed by hand; the text around them is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS, read_result
from benchmarks.common.sheets import sheets, write_sheet
from benchmarks.gpu import report as gpu_report
from benchmarks.latency import compiled_report, first_token_report, merging_report, reading_report, tower_report
from benchmarks.latency import pieces_report as pieces_latency_report
from benchmarks.latency import report as latency_report
from benchmarks.memory import combined_report, pieces_report, situations
from benchmarks.memory import report as memory_report
from benchmarks.quality import encoded_report, positions_report
from benchmarks.quality import report as quality_report
from benchmarks.quality import tower_report as tower_quality_report
from benchmarks.throughput import predicted_report as throughput_predicted_report
from benchmarks.throughput import report as throughput_report

#: Name of a result, and of the marker of all its figures → the module with its `tables`.
TABLES: dict[str, Any] = {
    "quality": quality_report,
    "quality-fine": quality_report,
    "quality-pages": quality_report,
    "encoded": encoded_report,
    "encoded-fine": encoded_report,
    "encoded-pages": encoded_report,
    "positions": positions_report,
    "positions-fine": positions_report,
    "positions-pages": positions_report,
    "combined": combined_report,
    "memory": memory_report,
    "pieces": pieces_report,
    "latency": latency_report,
    "merging": merging_report,
    "reading": reading_report,
    "throughput": throughput_report,
    "throughput_predicted": throughput_predicted_report,
    "compiled": compiled_report,
    "pieces_latency": pieces_latency_report,
    "first_token": first_token_report,
    "predicted": gpu_report,
    "tower": tower_report,
    "tower_quality": tower_quality_report,
    "tower_quality-fine": tower_quality_report,
    "tower_quality-pages": tower_quality_report,
}
Results = dict[str, dict[str, Any]]
#: Marker of what a reader decides by → its parts: the result that a part needs, and what makes it from all results at hand.
KEY: dict[str, list[tuple[str, Callable[[Results], str]]]] = {
    "answers": [("quality", quality_report.answers), ("quality", quality_report.conditions)],
    "answers-models": [("quality", quality_report.answers_by_model)],
    "answers-by-type": [("quality-pages", quality_report.by_type)],
    "answers-smallest": [("quality", quality_report.smallest)],
    "encoded-answers": [("encoded", encoded_report.answers)],
    "helps": [("first_token", situations.helps)],
    "fits": [("combined", combined_report.fits)],
    "peaks": [("pieces", pieces_report.peaks)],
    "decoding": [("latency", latency_report.decoding)],
    "speed": [
        ("latency", latency_report.verdict),
        ("compiled", compiled_report.faster),
        ("merging", merging_report.cost),
        ("pieces_latency", pieces_latency_report.cost),
    ],
    "first-token": [("first_token", first_token_report.sooner)],
    "tower-answers": [("tower_quality", tower_quality_report.answers)],
    "tower-time": [("tower", tower_report.shorter)],
    "tower-predicted": [("predicted", gpu_report.tower)],
    "own-work-predicted": [("predicted", gpu_report.own_work)],
}
PLOTTED = (combined_report, pieces_report, latency_report, first_token_report)


def write(results: Path, docs: Path) -> list[Path]:
    """Make everything that the results at hand allow; returns the files written."""
    found = at_hand(results)
    written = []
    for path, text in pages(found, docs).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for name, result in found.items():
        written += [write_sheet(docs / "tables" / file, lines) for file, lines in sheets(name, result).items()]
        if TABLES[name] in PLOTTED:
            written += TABLES[name].plots(result, docs / "assets")
    return [*written, *quality_report.plot(found, docs / "assets")]


def at_hand(results: Path = RESULTS) -> Results:
    """The results that were measured."""
    found = {name: read_result(name, results) for name in TABLES}
    return {name: result for name, result in found.items() if result is not None}


def pages(results: Results, docs: Path) -> dict[Path, str]:
    """Pages with markers → their text. Where a folder has no page of a benchmark's figures, they get one of their own."""
    files = [*docs.rglob("*.md"), *(docs.parent.glob("README.md") if docs.name == "docs" else ())]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    made = {
        name: folded(TABLES[name].tables(result)) + "\n" + _footer(name, result) for name, result in results.items()
    }
    for name in made:
        if not any(_marker(name) in text for text in texts.values()):
            texts[docs / "tables" / f"{name}.md"] = f"# {name}\n\n{_marker(name)}\n<!-- end {name} -->\n"
    for name, parts in KEY.items():
        if any(_marker(name) in text for text in texts.values()) and any(needed in results for needed, _ in parts):
            made[name] = "".join(make(results) for needed, make in parts if needed in results)
    changed = {}
    for path, text in texts.items():
        new = text
        for name, content in made.items():
            pattern = rf"({_marker(name)}\n).*?(<!-- end {name} -->)"
            new = re.sub(pattern, lambda match, own=content: f"{match[1]}\n{own}\n{match[2]}", new, flags=re.S)
        if any(_marker(name) in text for name in made):
            changed[path] = new
    return changed


def folded(text: str) -> str:
    """Figures with every section behind a fold, the first one open: a page then shows what there is before it shows all of it.

    Example:
        >>> print(folded("In short.\\n\\n### bf16\\n\\n| a |\\n"))
        In short.
        <BLANKLINE>
        <details markdown open>
        <summary>bf16</summary>
        <BLANKLINE>
        | a |
        <BLANKLINE>
        </details>
        <BLANKLINE>
    """
    before, *sections = re.split(r"^#{3,4} (.+)\n", text, flags=re.M)
    parts = [before.strip()] if before.strip() else []
    for number, (title, content) in enumerate(zip(sections[::2], sections[1::2], strict=True)):
        opened = "" if number else " open"
        parts.append(f"<details markdown{opened}>\n<summary>{title}</summary>\n\n{content.strip()}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _marker(name: str) -> str:
    return f"<!-- begin {name} -->"


def _footer(name: str, result: dict[str, Any]) -> str:
    files = "As CSV: " + ", ".join(f"[{file}]({file})" for file in sheets(name, result)) + ".\n"
    if "environment" not in result:
        return files
    where = result["environment"]
    quick = " `--quick`: few cases, rough figures." if result["quick"] else ""
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    return (
        f"{files}\nMeasured {where['date']}: {where['cpu']}{gpu}, {where['threads']} threads, torch {where['torch']}, "
        f"transformers {where['transformers']}, bitsandbytes {where['bitsandbytes']}, peft {where['peft']}, seed "
        f"{where['seed']}.{quick}\n"
    )
