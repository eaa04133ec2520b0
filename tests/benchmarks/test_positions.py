"""Long answers, token by token: what is compared with what."""

import argparse

import pytest

from benchmarks import report
from benchmarks.quality import measure, positions
from benchmarks.quality.positions import said_next, said_next_anew, shares
from benchmarks.quality.rules import Rule
from benchmarks.small_model.tasks import task_of
from trim_plugin.embedded import SMALL_MODEL

EXACT = Rule("paper, merged", 1.0, {"top_k_ratio": 1.0})
POOR = Rule("paper, dropped", 0.01, {"top_k_ratio": 0.01, "merge": False})


@pytest.fixture(scope="module")
def asked():
    """Questions with long answers, and stock's answers with their end."""
    model = measure.load_model(SMALL_MODEL)
    batches = positions._asked(model, task_of(SMALL_MODEL), "list", 6)
    told = [stock.first for stock in measure.run_stock(model, batches)]
    return model, batches[0], [[*row, model.generation_config.eos_token_id] for row in told[0]]


@pytest.mark.parametrize("choose", [said_next, said_next_anew])
def test_exact_mode_says_what_stock_says_at_every_position(asked, choose):
    marks = choose(asked[0], asked[1], EXACT, asked[2])
    assert [len(row) for row in marks] == [len(row) for row in asked[2]]
    assert all(mark for row in marks for mark in row)


def test_one_wrong_token_does_not_spoil_the_rest(asked):
    """A rule is told stock's answer, whatever it would have said itself."""
    model, batch, told = asked
    marks = said_next(model, batch, POOR, told)
    wrong = [row for row in marks if not all(row)]
    assert wrong, "at a hundredth, dropped, some tokens differ"
    assert any(True in row[row.index(False) :] for row in wrong)


def test_stretches():
    (first, second) = shares([[True] * 8 + [False], [True, False]])
    assert (first["from"], first["tokens"], first["agreement"]) == (0, 10, 0.9)
    assert (second["from"], second["tokens"], second["agreement"]) == (8, 1, 0.0)


def test_the_report_has_a_line_for_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "RULES", (EXACT,))
    monkeypatch.setattr(positions, "ASKING", (EXACT,))
    given = {"scenes": 3, "quick": False, "out": tmp_path, "model": None, "positions": True}
    measure.run(argparse.Namespace(**given))
    page, *_ = report.write(tmp_path, tmp_path / "docs")
    text = page.read_text(encoding="utf-8")
    assert "| paper, merged | 1 | once | 100.00 % (100.00 … 100.00) |" in text
    assert "| paper, merged | 1 | for every token | 100.00 % (100.00 … 100.00) |" in text
