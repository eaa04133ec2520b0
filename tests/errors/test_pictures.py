"""The rows of docs/errors.md about encoded pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trim_plugin import KCenter, TopKPerHead, TopPPerHead, TrimmedCache, encode_pictures, open_picture
from trim_plugin.compat import CACHE
from trim_plugin.embedded import ask, examples
from trim_plugin.pictures import encoded

PICTURE = examples()[0].picture


@pytest.fixture(scope="module")
def page(small):
    return encode_pictures(*small, [PICTURE])


@pytest.fixture(autouse=True)
def _nothing_ran(small, page, request):
    """Every error comes before any work, and the model answers as before."""
    ran: list[int] = []
    model, processor = small
    towers = (model.model.vision_model, model.model.language_model)
    handles = [tower.register_forward_pre_hook(lambda *_: ran.append(1)) for tower in towers]
    yield
    for handle in handles:
        handle.remove()
    assert ran == [] or request.node.name == "test_rule_empties_a_picture", "nothing ran"
    cache = TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=page)
    ours = model.generate(**page.inputs(processor, "Read all digits."), **{CACHE: cache}, max_new_tokens=3)
    assert ours.equal(model.generate(**ask(processor, "Read all digits.", PICTURE), max_new_tokens=3))


def test_picture_file_missing(small, tmp_path):
    for read in (open_picture, lambda path: encode_pictures(*small, [path])):
        with pytest.raises(FileNotFoundError, match="no such picture"):
            read(tmp_path / "none.png")


def test_pictures_of_another_model(small, page):
    with pytest.raises(ValueError, match="encoded by another model, or its vision tower or projector was trained"):
        TrimmedCache(small[0], pictures=dataclasses.replace(page, mark=1.1 * page.mark))
    with pytest.raises(ValueError, match="encoded by another model: 4 tiles of 65 tokens of width 64"):
        TrimmedCache(small[0], pictures=dataclasses.replace(page, states=page.states[:, :64]))


def test_pictures_of_an_unknown_model(small, page):
    encoded._warn_unknown.cache_clear()
    unknown = dataclasses.replace(page, mark=torch.full_like(page.mark, torch.nan))
    with pytest.warns(UserWarning, match="Whether this model encoded these pictures cannot be told"):
        TrimmedCache(small[0], pictures=unknown)


def test_pictures_of_two_models(page):
    with pytest.raises(ValueError, match="encoded by two different models"):
        page + dataclasses.replace(page, mark=1.1 * page.mark)


def test_pictures_and_pixels(small, page):
    model, processor = small
    with pytest.raises(ValueError, match="was given encoded pictures, and the call brings pixel_values as well"):
        model.generate(**ask(processor, "?", PICTURE), **{CACHE: TrimmedCache(model, pictures=page)})


def test_pictures_of_another_batch(small, page):
    model, processor = small
    cache = TrimmedCache(model, pictures=[page, page])
    with pytest.raises(ValueError, match="was given encoded pictures of 2 samples, but input_ids has 1"):
        model.generate(**page.inputs(processor, "?"), **{CACHE: cache})


def test_pictures_not_encoded(small):
    for wrong in (PICTURE, [PICTURE], "page.safetensors"):
        with pytest.raises(TypeError, match="pictures must be what encode_pictures returns"):
            TrimmedCache(small[0], pictures=wrong)
    with pytest.raises(ValueError, match="pictures is an empty list"):
        TrimmedCache(small[0], pictures=[])


def test_pictures_without_a_tower(small):
    with pytest.raises(ValueError, match="need an Mllama model with a vision tower"):
        encode_pictures(small[0].model.language_model, small[1], [PICTURE])


def test_images_not_a_list(small):
    with pytest.raises(ValueError, match="images must be a list of pictures"):
        encode_pictures(*small, PICTURE)
    with pytest.raises(ValueError, match="No image was given"):
        encode_pictures(*small, [])


def test_rule_needs_a_prompt(small):
    for rule in (TopKPerHead(0.25), TopPPerHead(0.25)):
        with pytest.raises(ValueError, match="chooses by the attention of a prompt, and there is none yet"):
            encode_pictures(*small, [PICTURE], rule=rule)


def test_rule_empties_a_picture(small):
    with pytest.raises(ValueError, match="removed every visual token of a picture"):
        encode_pictures(*small, [PICTURE], rule=lambda scores, visible: torch.full_like(scores, -torch.inf))


def test_prompt_about_other_pictures(small, page):
    quarter = dataclasses.replace(page, rule=repr(KCenter(0.25)))
    two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    for text in ("<|image|><|image|>What?", [{"role": "user", "content": two}]):
        with pytest.raises(ValueError, match=r"The prompt of sample 0 has \d pictures .* but 1 are encoded"):
            quarter.inputs(small[1], text)
