import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.compat import cache_of
from trim_plugin.embedded import SMALL_MODEL, ask

FOLDER = str(Path(__file__).parents[2] / "trim_plugin" / "integrations" / "custom_generate")
WITHOUT_IMPORT = f"""
import sys, torch
from transformers import AutoProcessor, MllamaForConditionalGeneration
from PIL import Image

model = MllamaForConditionalGeneration.from_pretrained({str(SMALL_MODEL)!r}).eval()
processor = AutoProcessor.from_pretrained({str(SMALL_MODEL)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "Read all digits."}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (80, 80)), text=prompt, add_special_tokens=False, return_tensors="pt")
assert "trim_plugin" not in sys.modules
output = model.generate(
    **inputs, custom_generate={FOLDER!r}, trust_remote_code=True, top_k_ratio=0.1, max_new_tokens=2, return_dict_in_generate=True
)
print(type(output.cache).__name__, output.cache.report().kept_share < 1)
"""


@pytest.fixture
def hub_modules(tmp_path, monkeypatch):
    """transformers copies the code to its module cache: one that ends with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_without_importing_the_package(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )
    assert result.stdout.split() == ["TrimmedCache", "True"], result.stderr


@pytest.mark.usefixtures("hub_modules")
def test_equals_the_named_cache(small):
    model, processor = small
    inputs = ask(processor)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    named = model.generate(**inputs, **settings, cache_implementation="trimmed", cache_config={"top_k_ratio": 0.1})
    for own in ({"top_k_ratio": 0.1}, {"cache_config": {"top_k_ratio": 0.1}}):
        custom = model.generate(**inputs, **settings, **own, custom_generate=FOLDER, trust_remote_code=True)
        assert isinstance(cache_of(custom), TrimmedCache)
        assert torch.equal(custom.sequences, named.sequences)
        assert cache_of(custom).kept_indices[0].equal(cache_of(named).kept_indices[0])


@pytest.mark.usefixtures("hub_modules")
def test_refuses_what_contradicts(small):
    model, processor = small
    own = {"custom_generate": FOLDER, "trust_remote_code": True, "max_new_tokens": 1}
    with pytest.raises(ValueError, match="is another one"):
        model.generate(**ask(processor), **own, cache_implementation="static")
    with pytest.raises(ValueError, match="not both"):
        model.generate(**ask(processor), **own, cache_config={}, top_k_ratio=0.5)
