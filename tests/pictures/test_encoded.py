"""Files of encoded pictures, and which model they are of."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trim_plugin import KCenter, Pictures, TopKPerHead, TopPPerHead, TrimmedCache, encode_pictures
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.pictures import encoded, stored
from trim_plugin.pictures.fingerprint import difference, fingerprint
from trim_plugin.pictures.layout import prompt_inputs


@pytest.fixture(scope="module")
def small():
    return load_small_model()


@pytest.fixture
def page(small):
    return encode_pictures(*small, [examples()[4].picture], rule=KCenter(0.25))


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_what_is_loaded_is_what_was_saved(page, tmp_path):
    path = tmp_path / "page.safetensors"
    page.save(path)
    again = Pictures.load(path)
    for name in ("states", "index", "sizes", "mark"):
        assert torch.equal(getattr(page, name), getattr(again, name))
        assert getattr(page, name).dtype == getattr(again, name).dtype
    for name in stored.NUMBERS:
        assert getattr(page, name) == getattr(again, name)
    assert [file.name for file in tmp_path.iterdir()] == ["page.safetensors"]


def test_a_quarter_takes_a_quarter_of_the_room(small, tmp_path):
    picture = next(example.picture for example in examples() if Image.open(example.picture).size[0] > 60)
    sizes = []
    for name, rule in (("whole", None), ("quarter", KCenter(0.25))):
        pictures = encode_pictures(*small, [picture], rule=rule)
        pictures.save(tmp_path / name)
        sizes.append(pictures.states.nbytes)
        assert (tmp_path / name).stat().st_size < pictures.nbytes + 2000
    assert sizes[1] <= 0.26 * sizes[0]


def test_a_failed_write_leaves_the_old_file(page, tmp_path, monkeypatch):
    path = tmp_path / "page.safetensors"
    page.save(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(stored, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        (page + page).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def rewritten(path, change_tensors=lambda tensors: tensors, **metadata):
    tensors, before = load_file(path), metadata_of(path)
    save_file(change_tensors(tensors), path, metadata={**before, **metadata})


WRONG = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is cut off or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is cut off or damaged"),
    "text": (lambda path: path.write_text("hello"), "is cut off or damaged"),
    "weights": (lambda path: save_file({"a": torch.ones(1)}, path), "not one of encoded pictures"),
    "later version": (lambda path: rewritten(path, version="2"), "written by a later version"),
    "a tensor is missing": (
        lambda path: rewritten(path, lambda tensors: {n: t for n, t in tensors.items() if n != "sizes"}),
        "is cut off or damaged",
    ),
    "fields are missing": (lambda path: rewritten(path, pictures="{}"), "is cut off or damaged"),
    "tensors don't fit": (
        lambda path: rewritten(path, lambda tensors: tensors | {"index": tensors["index"][1:].contiguous()}),
        "its tensors don't fit together",
    ),
    "an index beyond the pictures": (
        lambda path: rewritten(path, lambda tensors: tensors | {"index": tensors["index"] + 1000}),
        "its tensors don't fit together",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_said(page, tmp_path, spoil, message):
    path = tmp_path / "page.safetensors"
    page.save(path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        Pictures.load(path)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of encoded pictures"):
        Pictures.load(tmp_path / "page.safetensors")


def test_an_older_layout_is_read(page, tmp_path):
    path = tmp_path / "page.safetensors"
    page.save(path)
    assert int(metadata_of(path)["version"]) == stored.VERSION
    assert json.loads(metadata_of(path)["pictures"])["rule"] == "KCenter(0.25)"


def test_another_model_is_told(small, page):
    other, _ = load_small_model()
    with torch.no_grad():
        weight = other.model.multi_modal_projector.weight
        weight += 0.001 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="its vision tower or projector was trained since"):
        TrimmedCache(other, pictures=page)
    TrimmedCache(small[0], pictures=page)


def test_the_tower_counts_too(page):
    other, _ = load_small_model()
    with torch.no_grad():
        other.model.vision_model.patch_embedding.weight *= 1.001
    with pytest.raises(ValueError, match="encoded by another model"):
        TrimmedCache(other, pictures=page)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_format_is_the_same(page, dtype):
    model, processor = load_small_model(dtype)
    cache = TrimmedCache(model, pictures=page)
    assert model.generate(**page.inputs(processor, "Hi"), past_key_values=cache, max_new_tokens=2).shape[0] == 1


def test_another_shape_is_told(page):
    from ..random_models import random_model

    with pytest.raises(ValueError, match=r"4 tiles of 65 tokens of width 128, but this one has 4 of 5 of width 32"):
        TrimmedCache(random_model(), pictures=page)


def test_a_fingerprint_knows_every_weight(small):
    model, _ = load_small_model()
    before = fingerprint(model.model)
    assert difference(before, fingerprint(small[0].model)) == 0
    with torch.no_grad():
        model.model.multi_modal_projector.bias[3] += 0.05
    assert difference(before, fingerprint(model.model)) > 1e-4
    assert difference(before, torch.full_like(before, torch.nan)) is None


def test_pictures_in_a_row_are_what_was_encoded_together(small):
    files = [example.picture for example in examples()[:3]]
    together = encode_pictures(*small, files, rule=KCenter(0.3))
    one_by_one = encode_pictures(*small, files[:1], rule=KCenter(0.3)) + encode_pictures(
        *small, files[1:], rule=KCenter(0.3)
    )
    for name in ("states", "index", "sizes"):
        assert torch.equal(getattr(together, name), getattr(one_by_one, name))
    assert (together.tiles, together.total) == (one_by_one.tiles, 3 * 260)


@pytest.mark.parametrize("rule", [TopKPerHead(0.5), TopPPerHead(0.5)])
def test_a_rule_that_needs_a_prompt_is_refused(small, rule):
    with pytest.raises(ValueError, match="chooses by the attention of a prompt"):
        encode_pictures(*small, [examples()[0].picture], rule=rule)


def test_wrong_images_are_said(small, tmp_path):
    with pytest.raises(ValueError, match="No image was given"):
        encode_pictures(*small, [])
    with pytest.raises(ValueError, match="put it into a list"):
        encode_pictures(*small, str(examples()[0].picture))
    with pytest.raises(FileNotFoundError, match="no such picture"):
        encode_pictures(*small, [tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match="removed every visual token"):
        encode_pictures(
            *small,
            [examples()[0].picture],
            rule=lambda scores, visible: scores.masked_fill(visible[:, None], -torch.inf),
        )


def test_inputs_are_the_processors_own(small):
    _, processor = small
    pictures = [Image.new("RGB", (40 * columns, 40 * rows)) for rows, columns in ((1, 1), (2, 2), (1, 3))]
    prompt = "<|image|>first<|image|>second<|image|>third"
    own = processor(images=[pictures], text=[prompt], add_special_tokens=False, return_tensors="pt")
    ours = prompt_inputs(processor, [[1, 4, 3]], [prompt], 4)
    for name, tensor in ours.items():
        assert torch.equal(tensor, own[name]), name


def test_a_batch_is_padded_as_the_processor_pads(small):
    _, processor = small
    pictures = [[Image.new("RGB", (40, 40))], [Image.new("RGB", (80, 80)), Image.new("RGB", (40, 120))]]
    prompts = ["<|image|>Hi", "<|image|><|image|>Read all digits."]
    processor.tokenizer.padding_side = "left"
    own = processor(images=pictures, text=prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    ours = prompt_inputs(processor, [[1], [4, 3]], prompts, 4)
    for name, tensor in ours.items():
        assert torch.equal(tensor, own[name]), name


def test_a_prompt_about_other_pictures_is_said(page, small):
    with pytest.raises(ValueError, match="has 2 pictures"):
        page.inputs(small[1], "<|image|><|image|>Hi")


def test_a_batch_looks_at_the_model_once(small, page, monkeypatch):
    looks = []
    monkeypatch.setattr(encoded, "fingerprint", lambda model: looks.append(model) or fingerprint(model))
    TrimmedCache(small[0], pictures=[page, page, page])
    assert len(looks) == 1
