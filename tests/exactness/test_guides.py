"""The guides' code runs and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from trim_plugin.compat import CACHE

from ..random_models import generate
from ..random_models import trimmed as generate_trimmed

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)


@pytest.mark.skipif(CACHE != "cache", reason="the page says cache=, as the pinned transformers has it")
def test_conversations():
    page = (GUIDES / "conversations.md").read_text(encoding="utf-8")
    names = {}
    for number, code in enumerate(CODE.findall(page)):
        exec(compile(code, f"conversations.md, block {number}", "exec"), names)
    cache, branch, inputs = names["cache"], names["branch"], names["inputs"]
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == names["answer"].shape[1] - 1
    assert branch.get_seq_length() == names["second"].shape[1] - 1 > cache.get_seq_length()
    assert torch.equal(cache.kept_indices[0], branch.kept_indices[0])
    assert names["prefix"].get_seq_length() == length - 1, "branches leave the prefix alone"
    for answer in (*names["answers"], *names["together"][:, None].unbind(0)):
        assert torch.equal(names["answers"][0], answer)
    model = names["model"]
    exact = generate_trimmed(model, inputs, {"top_k_ratio": 1.0})
    assert torch.equal(generate(model, inputs).sequences, exact.sequences)
