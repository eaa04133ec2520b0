"""Encoded pictures: which model they are of, and prompts about them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from trim_plugin import KCenter, TrimmedCache, encode_pictures
from trim_plugin.compat import CACHE
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.pictures import encoded
from trim_plugin.pictures.fingerprint import fingerprint, is_other
from trim_plugin.pictures.layout import prompt_inputs


@pytest.mark.parametrize("name", ["multi_modal_projector", "vision_model.patch_embedding"])
def test_a_model_that_was_trained_since_is_told(small, page, name):
    other, _ = load_small_model()
    with torch.no_grad():
        other.model.get_submodule(name).weight.mul_(1.001)
    with pytest.raises(ValueError, match="its vision tower or projector was trained since"):
        TrimmedCache(other, pictures=page)
    TrimmedCache(small[0], pictures=page)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_format_is_the_same(page, dtype):
    model, processor = load_small_model(dtype)
    cache = TrimmedCache(model, pictures=page)
    assert model.generate(**page.inputs(processor, "Hi"), **{CACHE: cache}, max_new_tokens=2).shape[0] == 1


def test_a_fingerprint_knows_every_weight(small):
    model, _ = load_small_model()
    before = fingerprint(model.model)
    assert is_other(before, fingerprint(small[0].model)) is False
    with torch.no_grad():
        model.model.multi_modal_projector.bias[3] += 0.05
    assert is_other(before, fingerprint(model.model)) is True
    assert is_other(before, torch.full_like(before, torch.nan)) is None


def test_pictures_in_a_row_are_what_was_encoded_together(small):
    files = [example.picture for example in examples()[:3]]
    together = encode_pictures(*small, files, rule=KCenter(0.3))
    one_by_one = encode_pictures(*small, files[:1], rule=KCenter(0.3)) + encode_pictures(
        *small, files[1:], rule=KCenter(0.3)
    )
    for name in ("states", "index", "sizes"):
        assert torch.equal(getattr(together, name), getattr(one_by_one, name))
    assert (together.tiles, together.total) == (one_by_one.tiles, 3 * 260)


def test_inputs_are_the_processors_own(small):
    _, processor = small
    pictures = [[Image.new("RGB", (40, 40))], [Image.new("RGB", (80, 80)), Image.new("RGB", (40, 120))]]
    prompts = ["<|image|>Hi", "<|image|>first<|image|>Read all digits."]
    processor.tokenizer.padding_side = "left"
    own = processor(images=pictures, text=prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    ours = prompt_inputs(processor, [[1], [4, 3]], prompts, 4)
    for name, tensor in ours.items():
        assert torch.equal(tensor, own[name]), name


def test_a_batch_looks_at_the_model_once(small, page, monkeypatch):
    looks = []
    monkeypatch.setattr(encoded, "fingerprint", lambda model: looks.append(model) or fingerprint(model))
    TrimmedCache(small[0], pictures=[page, page, page])
    assert len(looks) == 1
