"""Time to the first token: the counted arithmetic is what torch counts, and the report says what was measured."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.latency import first_token
from trim_plugin.planning.configuration import built_in_config


def test_the_arithmetic_is_what_torch_counts(small):
    small.set_attn_implementation("eager")  # of which every product is counted
    inputs = scenario_inputs(small, SCENARIOS["page"], 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        small(**inputs, logits_to_keep=1)
    expected = first_token.arithmetic(small.config, inputs["input_ids"].shape[1])
    assert expected["stock"] == pytest.approx(counted.get_total_flops(), rel=0.01)
    tower = counted.get_flop_counts()["MllamaForConditionalGeneration.model.vision_model"]
    assert expected["tower"] == pytest.approx(sum(tower.values()), rel=0.01)


def test_an_encoded_page_leaves_the_text_model_alone_at_11b():
    counted = first_token.arithmetic(built_in_config("11b"), 50)
    parts = [counted[part] for part in ("tower", "projector", "visual_keys_values", "text")]
    assert sum(parts) == counted["stock"]
    assert counted["times_less"]["encoded whole"] == pytest.approx(sum(parts) / sum(parts[2:]))
    assert counted["times_less"]["encoded 25 %"] > counted["times_less"]["encoded whole"] > 3


def test_a_page_is_measured_and_reported(tmp_path):
    row = first_token.measure("small", 1, "cpu")
    ways = {way["way"]: way for way in row["ways"]}
    assert list(ways) == list(first_token.WAYS)
    assert ways["encoded whole"]["same_token"]
    # A quarter of the states; which token each one was, its size and what is said about the file are small beside 11B states.
    assert row["file_bytes"]["25 %"] - row["file_bytes"]["whole"] / 4 < 8192
    counted = [first_token.arithmetic(built_in_config("11b"), 50)]
    result = {"environment": environment(), "quick": True, "rows": [row], "arithmetic_11b": counted}
    write_result("first_token", result, tmp_path)
    page = report.write(tmp_path, tmp_path / "docs")[0].read_text(encoding="utf-8")
    assert "| encoded 25 %, from a file |" in page
    assert "| 50 | 89.5 % |" in page
