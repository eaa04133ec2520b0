"""The pages are made from the results that lie beside them, and say what these say."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.common.results import environment, write_result
from benchmarks.common.sheets import sheets, write_sheet
from benchmarks.latency.pieces_report import cost
from benchmarks.memory import combined
from benchmarks.quality.report import MODELS, SETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def results():
    return report.at_hand()


def test_every_page_is_of_the_results_beside_it(results):
    made = report.pages(results, DOCS)
    assert {path.name for path in made} >= {"README.md", "benchmarks.md", "index.md", "quality.md"}
    old = [str(path.relative_to(ROOT)) for path, text in made.items() if text != path.read_text(encoding="utf-8")]
    assert old == [], "make them again: python -m benchmarks report"


def test_every_sheet_is_of_the_results_beside_it(results, tmp_path):
    made = {file: lines for name, result in results.items() for file, lines in sheets(name, result).items()}
    assert {path.name for path in (DOCS / "tables").glob("*.csv")} == set(made)
    for file, lines in made.items():
        new = write_sheet(tmp_path / file, lines)
        assert new.read_bytes() == (DOCS / "tables" / file).read_bytes(), "make it again: python -m benchmarks report"


def test_the_page_to_decide_by_is_short_and_shows_plots():
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    shown = re.findall(r"!\[.+\]\((assets/\S+\.png)\)", text)
    assert 4 <= len(shown) <= 5
    assert all((DOCS / plot).is_file() for plot in shown)


def answered(results, setting, where="fresh"):
    """Of each model that was asked there: its row of a setting."""
    found = {}
    for result, name in MODELS.items():
        for row in results.get(result, {"rows": []})["rows"]:
            if (row["where"], row["rule"], row["parameter"]) == (where, *setting):
                found[name] = row
    return found


@pytest.mark.parametrize("where", SETS)
def test_what_the_text_says_about_answers_holds_on_both_models(results, where):
    default, dropped, tenth, twentieth, random = (
        answered(results, setting, where)
        for setting in (
            ("k-center, merged", 0.35),
            ("paper, dropped", 0.1),
            ("k-center, merged", 0.1),
            ("k-center, merged", 0.05),
            ("random, merged", 0.1),
        )
    )
    for model in ("small", "fine"):
        assert default[model]["change_interval"][1] >= 0  # nothing that could be measured
        assert abs(default[model]["change"]) <= 0.002
        assert tenth[model]["change_interval"][1] >= 0
        assert dropped[model]["change_interval"][1] < -0.05  # many points
        assert random[model]["change_interval"][1] < tenth[model]["change_interval"][0]  # choosing matters
        assert tenth[model]["follow_up"]["agreement"] < tenth[model]["agreement"]  # second questions suffer first
    assert twentieth["fine"]["agreement_interval"][0] > twentieth["small"]["agreement_interval"][1]  # fewer will do


def test_what_the_text_says_about_pages_of_print_holds(results):
    default, paper, tenth, random, dropped = (
        answered(results, setting, "evaluation")["pages"]
        for setting in (
            ("k-center, merged", 0.35),
            ("paper, merged", 0.15),
            ("k-center, merged", 0.1),
            ("random, merged", 0.1),
            ("paper, dropped", 0.15),
        )
    )
    for row in (default, paper):  # nothing that could be measured, on any type of question
        assert all(part["change_interval"][1] >= 0 for part in (row, *row["by_type"].values()))
    assert default["by_type"]["page"]["agreement"] == 1
    assert default["kept_share"] < 0.75 * paper["kept_share"]
    assert 0.98 <= tenth["agreement"] < 0.995
    assert tenth["follow_up"]["agreement"] < tenth["agreement"]
    assert 1 / random["by_type"]["page"]["agreement"] == pytest.approx(8, abs=0.5)
    assert dropped["change_interval"][1] < 0


def test_figures_within_sentences(results):
    """Figures that stand in text, outside what is made."""
    row = {ratio: answered(results, ("paper, merged", ratio))["small"] for ratio in (0.25, 0.15, 0.1)}
    second = {ratio: one["follow_up"]["agreement"] for ratio, one in row.items()}
    forgotten = answered(results, ("paper, dropped", 0.15))["small"]["change"]
    setting = ("k-center, merged", 0.1)
    tenth = [*answered(results, setting).values(), answered(results, setting, "evaluation")["pages"]]
    lost, changed = sorted(-100 * one["change"] for one in tenth), sorted(100 - 100 * one["agreement"] for one in tenth)
    fits = {(one["way"], one["weights"]): one for one in results["combined"]["rows"] if not one["adapter"]}
    most, stock = (fits[way, "nf4"]["largest_batch"] for way in ("KCenter(0.1), nf4 KV", "stock"))
    encoded = [one for one in results["encoded"]["rows"] if (one["rule"], one["parameter"]) == ("encoded", 0.25)]
    assert all(one["agreement"] >= 0.99 for one in encoded)  # "at most 1 % of the small model's answers change"
    expected = {
        "explanation/method.md": [
            f"one second question in {1 / (1 - second[0.1]):.0f} is answered",
            f"for one such answer in {1 / (second[0.25] - second[0.15]):.0f}.",
            f"the same ratio would lose {-100 * forgotten:.0f} points",
        ],
        "index.md": [
            f"{lost[0]:.1f} to {lost[-1]:.1f} points on three small models",
            f"and {changed[0]:.1f} to {changed[-1]:.1f} % of the answers",
            f"a batch of {most} instead of {stock}, *calculated*",
        ],
        "guides/memory-planning.md": [f"says {stock} samples for stock and {most} for the trimmed cache"],
    }
    for page, sentences in expected.items():
        text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
        for sentence in sentences:
            assert sentence in text, page


def test_reports_leave_the_text_around_the_markers_alone(tmp_path):
    case = {"shape": "small", "batch": 2, "turns": 1}
    ratio = {"median": 0.9, "low": 0.9, "high": 0.9}
    row = {"way": "in pieces", "pieces": 2, "seconds": ratio, "ratio": ratio, "ratio_interval": [0.8, 1.0]}
    result = {"environment": environment(), "quick": True, "rows": [case | {"rows": [row]}]}
    write_result("pieces_latency", result, tmp_path)
    around = "before\n<!-- begin {0} -->\nold\n<!-- end {0} -->\nafter\n"
    names = ("pieces_latency", "speed", "answers")
    page = tmp_path / "page.md"
    page.write_text("".join(map(around.format, names)), encoding="utf-8")
    report.write(tmp_path, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("before\n<!--") == text.count("-->\nafter\n") == 3
    table, speed, answers = text.split("after\n")[:3]
    assert "| small, batch 2 | in pieces | 2 | 900 |" in table
    assert "`--quick`" in table
    assert cost({"pieces_latency": result}) in speed
    assert answers == "before\n<!-- begin answers -->\nold\n<!-- end answers -->\n"  # of a result that is not there


def test_a_sheet_has_a_line_a_measurement(tmp_path):
    rows = [
        {"batch": 1, "rows": [{"way": "stock", "ratio": {"median": 2}}, {"way": "exact", "interval": [0.5, 1]}]},
        {"batch": 2, "error": "no memory"},
    ]
    (lines,) = sheets("memory", {"quick": True, "rows": rows, "skipped": []}).values()
    with write_sheet(tmp_path / "tables" / "memory.csv", lines).open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["batch"] for line in read] == ["1", "1", "2"]
    assert (read[0]["ratio.median"], read[1]["interval.1"], read[2]["error"]) == ("2", "1", "no memory")
    assert read[2]["way"] == ""


def test_what_fits_grows_with_what_is_left_out(results):
    """The figures are the planner's of today, and an adapter takes what peft says it takes."""
    from trim_plugin.planning.configuration import built_in_config

    kept = results["combined"]
    config = built_in_config("11b")
    assert combined.rows(config, 0, False) == [row for row in kept["rows"] if not row["adapter"]]
    assert combined.rows(config, kept["adapter"], True) == [row for row in kept["rows"] if row["adapter"]]
    for weights in combined.WEIGHTS:
        batches = [row["largest_batch"] for row in kept["rows"] if row["weights"] == weights and not row["adapter"]]
        assert batches == sorted(set(batches))
    pytest.importorskip("peft")
    # q, k, v and o of 40 layers, 8 key-value heads of 128: rank x (inputs + outputs), in float32.
    assert combined.adapter_bytes() == 40 * 16 * 4 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) == kept["adapter"]
