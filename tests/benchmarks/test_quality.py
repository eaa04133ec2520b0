import argparse

import pytest
import torch

from benchmarks import report
from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.quality import measure as quality
from benchmarks.quality import questions
from benchmarks.quality import report as quality_report
from benchmarks.quality.conditions import Condition, conditions, load_model
from benchmarks.quality.rules import Rule
from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.embedded import SMALL_MODEL

EXACT = Rule("exact", 1.0, {"top_k_ratio": 1.0})
PAPER = Rule("paper, dropped", 0.1, {"top_k_ratio": 0.1, "merge": False})


def arguments(folder, **more):
    given = {
        "scenes": 4,
        "quick": False,
        "out": folder,
        "adapter": None,
        "model": None,
        "resume": False,
        "positions": False,
    }
    return argparse.Namespace(**given | more)


@pytest.fixture
def few(monkeypatch):
    """Two rules, and one condition of one rule."""
    monkeypatch.setattr(quality.rules, "all_rules", lambda quick: [EXACT, PAPER])
    monkeypatch.setattr(quality, "conditions", lambda adapter: [Condition("bf16 weights", "bf16")])
    monkeypatch.setattr(Condition, "rules", lambda self: [Rule("paper, merged", 0.1, {"top_k_ratio": 0.1})])


def test_quality_writes_what_the_report_reads(tmp_path, few):
    result = quality.run(arguments(tmp_path))
    evaluation = {row["rule"]: row for row in result["rows"] if row["where"] == "evaluation"}
    exact, paper = evaluation["exact"], evaluation["paper, dropped"]
    for turn in (exact, exact["follow_up"]):
        assert turn["agreement"] == 1.0
        assert turn["change"] == 0.0
    assert 0 < paper["kept_share"] < 1
    assert result["questions"] == 20
    assert [row["where"] for row in result["rows"]] == ["evaluation"] * 3 + ["fresh"] * 3 + ["bf16 weights"] * 2
    page, sheet, plot = report.write(tmp_path, tmp_path / "docs")
    text = page.read_text(encoding="utf-8")
    assert "<summary>bf16 weights</summary>" in text
    assert "| paper, dropped | 0.1 |" in text
    assert len(sheet.read_text(encoding="utf-8").splitlines()) == 1 + len(result["rows"])
    assert plot.stat().st_size < 200_000
    report.write(tmp_path, tmp_path / "docs")
    assert page.read_text(encoding="utf-8") == text


def test_a_condition_is_measured_on_half_of_the_fresh_scenes_or_on_all_of_all_sets(tmp_path, few, monkeypatch):
    found = [Condition("bf16 weights", "bf16"), Condition("LoRA adapter", everywhere=True)]
    monkeypatch.setattr(quality, "conditions", lambda adapter: found)
    monkeypatch.setattr(quality.rules, "all_rules", lambda quick: [])
    drawn, scenes_from = [], quality.scenes_from
    monkeypatch.setattr(
        quality, "scenes_from", lambda seed, *rest: drawn.append((seed, rest[0])) or scenes_from(seed, *rest)
    )
    rows = quality.run(arguments(tmp_path))["rows"]
    assert drawn == [(700_000_000, 2), (500_000_000, 4), (700_000_000, 4)]
    asked = {row["where"]: row["questions"] for row in rows}
    assert asked == {"bf16 weights": 10, "LoRA adapter, evaluation": 20, "LoRA adapter": 20}
    assert "under 2 other conditions" in quality_report.conditions({"quality": {"rows": rows}})


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, few, monkeypatch):
    whole = quality.run(arguments(tmp_path))
    ran, run_rule = [], quality.run_rule

    def noted(model, batches, rule, stock):
        ran.append(rule)
        return run_rule(model, batches, rule, stock)

    monkeypatch.setattr(quality, "run_rule", noted)
    more = Rule("paper, merged", 0.1, {"top_k_ratio": 0.1})
    monkeypatch.setattr(quality.rules, "all_rules", lambda quick: [EXACT, more, PAPER])
    again = quality.run(arguments(tmp_path, resume=True))
    assert ran == [more, more]
    assert [row for row in again["rows"] if row in whole["rows"]] == whole["rows"]
    assert len(again["rows"]) == len(whole["rows"]) + 2


def test_a_follow_up_is_answered_as_if_the_whole_conversation_were_read_at_once(small):
    scenes = questions.scenes_from(610_000_000, 6, small)
    for batch in questions.question_batches(small, scenes, 1):
        first, second = questions.answer_both(
            small, batch, TrimmedCache(small, TrimConfig(top_k_ratio=1.0)), batch.answers
        )
        assert first != second
        for sample, answer in enumerate(second):
            prompt = batch.inputs["input_ids"][sample][batch.inputs["attention_mask"][sample].bool()].tolist()
            ids = torch.tensor([prompt + batch.answers[sample] + batch.follow_ups[sample]])
            tiles = batch.inputs["cross_attention_mask"][sample, -1]
            reads = (ids[0] == small.config.image_token_index).long().cumsum(0)
            whole = batch.inputs["cross_attention_states"].view(
                len(first), -1, *batch.inputs["cross_attention_states"].shape[1:]
            )
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "cross_attention_mask": (reads[:, None, None] * tiles)[None],
                "cross_attention_states": whole[sample],
            }
            decoding = Decoding(small, inputs, stock_cache(small))
            assert questions._answers(decoding, decoding.prefill())[0] == answer


def row_of(rule, parameter, kept, low, high, types=()):
    part = {"accuracy": 0.9, "agreement": 0.99, "agreement_interval": [0.98, 1.0]}
    part |= {"change": (low + high) / 2, "change_interval": [low, high]}
    kinds = {kind: part | {"change_interval": [own, own]} for kind, own in dict(types).items()}
    own = {"where": "fresh", "rule": rule, "parameter": parameter, "kept_share": kept, "questions": 5}
    return own | part | {"follow_up": part, "cross_kv_ratio": kept, "by_type": kinds}


def test_the_smallest_setting_has_only_larger_ones_without_a_loss_above_it():
    rows = [
        row_of("k-center, merged", 0.5, 0.5, -0.01, 0.0),
        row_of("k-center, merged", 0.25, 0.25, -0.01, 0.0),
        row_of("k-center, merged", 0.1, 0.1, -0.02, -0.01),
        row_of("k-center, merged", 0.05, 0.05, -0.01, 0.0),
        row_of("paper, merged", 0.15, 0.4, -0.02, -0.01),
    ]
    text = quality_report.smallest({"quality": {"rows": rows}})
    assert "| `KCenter(…)` | small | 0.25 | 25 % |" in text
    assert "| `top_k_ratio=…` | small | none |" in text


def test_a_loss_on_whole_pages_alone_is_a_loss():
    types = {"page": -0.03, "absent": 0.0}
    rows = [row_of("k-center, merged", 0.5, 0.5, -0.01, 0.01, types)]
    assert "| `KCenter(…)` | pages | none |" in quality_report.smallest({"quality-pages": {"rows": rows}})
    assert "| k-center, merged | 0.5 | 50 % |" in quality_report.by_type({"quality-pages": {"rows": rows}})


def test_the_first_page_has_a_line_for_every_model_that_was_measured():
    turn = {"agreement": 0.98, "change": -0.004, "kept_share": 0.1}
    rows = [{"where": "fresh", "rule": rule, "parameter": value, **turn} for rule, value in quality_report.FIRST]
    models = {name: {"rows": rows} for name in ("quality", "quality-pages")}
    header, _, small, pages = quality_report.answers_by_model(models).splitlines()
    assert header.startswith("| model | default: kept | same answers | points |")
    assert small == "| small | 10 % | 98.0 % | -0.4 | -0.4 |"
    assert pages.startswith("| pages |")
    assert len(quality_report.answers_by_model({"quality": {"rows": rows[:1]}}).splitlines()) == 2


def test_a_condition_can_leave_the_tower_in_float32():
    pytest.importorskip("bitsandbytes")
    (condition,) = [found for found in conditions(None) if found.tower_whole]
    model = load_model(SMALL_MODEL, condition.weights, None, condition.tower_whole)
    bits = {"vision_model": set(), "language_model": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "multi_modal" not in name:
            bits[name.split(".")[1]].add(type(module).__name__)
    assert bits == {"vision_model": {"Linear"}, "language_model": {"Linear4bit"}}


def test_a_condition_that_costs_stock_its_answers_is_told_apart():
    def row(where, rule, accuracy, change, agreement=1.0):
        own = row_of(rule, None if rule == "stock" else 0.35, 0.35, change, change)
        return own | {"where": where, "accuracy": accuracy, "change": change, "agreement": agreement}

    rows = [
        row("fresh", "stock", 0.95, 0.0),
        row("int8 KV", "stock", 0.94, 0.0),
        row("int8 KV", "k-center, merged", 0.93, -0.01),
        row("int8 KV", "paper, dropped", 0.7, -0.24),
        row("nf4 weights", "stock", 0.4, 0.0),
        row("nf4 weights", "k-center, merged", 0.37, -0.03, 0.875),
    ]
    text = quality_report.conditions({"quality-pages": {"rows": rows}})
    assert "under 2 other conditions" in text
    assert "at worst: -1.0 (-1.0 … -1.0) of 1 cases (pages)." in text
    assert "nf4 weights: stock falls to 40.0 % on pages; there 87.5 % of answers stay." in text
    sound = quality_report.conditions({"quality": {"rows": rows[:3]}})
    assert "stock falls" not in sound
    assert quality_report.conditions({"quality": {"rows": rows[:1]}}) == ""
