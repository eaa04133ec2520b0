"""Which adapters shaped encoded pictures: others are told before any work, the same are taken, merged or not."""

from __future__ import annotations

import contextlib

import pytest
import torch

from trim_plugin import TrimConfig, TrimmedCache, encode_pictures, open_picture
from trim_plugin.compat import CACHE
from trim_plugin.embedded import ask, examples, load_small_model
from trim_plugin.forward.finding import find_model
from trim_plugin.pictures import fingerprint as fingerprints
from trim_plugin.pictures.fingerprint import fingerprint, is_other
from trim_plugin.pictures.recent import RecentPictures

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOWER = r".*(vision_model.*(q_proj|v_proj|fc1|fc2)|multi_modal_projector)$"
QUESTION = "Read all digits."
SAID = "encoded by another model, or its vision tower or projector was trained since, or has other adapters"


def adapted(kind="lora", dtype=torch.float32):
    """The small model with adapters "one", which is active, and "two", and its processor."""
    model, processor = load_small_model(dtype)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = {
            "lora": lambda: peft.LoraConfig(r=4, target_modules=TOWER, init_lora_weights=False),
            "dora": lambda: peft.LoraConfig(r=4, target_modules=TOWER, init_lora_weights=False, use_dora=True),
            "ia3": lambda: peft.IA3Config(
                target_modules=TOWER, feedforward_modules=r".*fc[12]$", init_ia3_weights=False
            ),
        }[kind]()
        if name == "one":
            model = peft.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.set_adapter("one")
    return model.eval(), processor


def layer_of(model):
    return find_model(model).multi_modal_projector


def answer(model, processor, pictures):
    """Tokens in exact mode."""
    inputs = pictures.inputs(processor, QUESTION)
    cache = TrimmedCache(model, TrimConfig(top_k_ratio=1.0), pictures=pictures)
    return model.generate(**inputs, **{CACHE: cache}, max_new_tokens=6, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]


def from_pixels(model, processor):
    inputs = ask(processor, QUESTION)
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]


def scaled(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["one"] *= 1.5


def trained(model):
    with torch.no_grad():
        layer_of(model).lora_B["one"].weight.mul_(1.01)


def written(model):
    layer_of(model).lora_B["one"].weight.data.mul_(1.01)  # which torch does not count as a change


def other_merged(model):
    model.set_adapter("two")
    model.merge_adapter()


CHANGES = {
    "switched": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["one", "two"]),
    "disabled": lambda model: model.disable_adapter(),
    "scaled": scaled,
    "trained": trained,
    "written": written,
    "the other merged": other_merged,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_pictures_of_other_adapters_are_told_and_not_remembered(change, tmp_path):
    model, processor = adapted()
    page = examples()[0].picture
    pictures = encode_pictures(model, processor, [page])
    assert torch.equal(answer(model, processor, pictures), from_pixels(model, processor))
    recent = RecentPictures(model, processor, folder=tmp_path)
    recent([open_picture(page)])
    made_before = TrimmedCache(model, pictures=pictures)
    with change(model) or contextlib.nullcontext():
        for refused in (
            lambda: TrimmedCache(model, pictures=pictures),
            lambda: again(model, processor, made_before, pictures),
        ):
            with pytest.raises(ValueError, match=SAID):
                refused()
        expected = from_pixels(model, processor)
        for remembering in (recent, RecentPictures(model, processor, folder=tmp_path)):
            found = remembering([open_picture(page)])
            assert torch.equal(found.states, encode_pictures(model, processor, [page]).states)
            assert torch.equal(answer(model, processor, found), expected)


def again(model, processor, cache, pictures):
    return model.generate(**pictures.inputs(processor, QUESTION), **{CACHE: cache}, max_new_tokens=2)


def test_what_was_remembered_under_an_adapter_is_of_use_when_it_comes_back():
    model, processor = adapted()
    recent = RecentPictures(model, processor)
    page = open_picture(examples()[0].picture)
    first = recent([page])
    with model.disable_adapter():
        assert recent([page]) is not first
    assert recent([page]) is first
    assert (recent.encoded, recent.reused) == (2, 1)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_and_the_same_merged_are_the_same(kind, dtype):
    model, _ = adapted(kind, dtype)
    mark = fingerprint(find_model(model))
    plain = fingerprint(find_model(load_small_model(dtype)[0]))
    model.merge_adapter()
    assert is_other(mark, fingerprint(find_model(model))) is False
    model.unmerge_adapter()
    assert is_other(mark, fingerprint(find_model(model))) is False
    with model.disable_adapter():
        assert is_other(mark, fingerprint(find_model(model))) is True
        assert is_other(plain, fingerprint(find_model(model))) is False
    assert is_other(mark, plain) is True
    assert is_other(mark, fingerprint(find_model(model.merge_and_unload()))) is False
    if kind != "ia3":
        model, _ = adapted(kind, dtype)
        model.set_adapter("two")
        assert is_other(mark, fingerprint(find_model(model.merge_and_unload()))) is True


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merged_and_unmerged_answer_alike(way):
    model, processor = adapted()
    pictures = encode_pictures(model, processor, [examples()[0].picture])
    expected = answer(model, processor, pictures)
    merged = getattr(model, way)() or model
    assert torch.equal(answer(merged, processor, pictures), expected)
    assert torch.equal(from_pixels(merged, processor), expected)


def test_a_merged_adapter_that_is_disabled_is_the_plain_model():
    model, _ = adapted()
    model.merge_adapter()
    weight = layer_of(model).base_layer.weight.clone()
    with model.disable_adapter():
        found = fingerprint(find_model(model))
    assert is_other(found, fingerprint(find_model(load_small_model()[0]))) is False
    assert torch.equal(weight, layer_of(model).base_layer.weight), "the model is read and never changed"


def test_modules_that_an_adapter_has_a_copy_of():
    model, _ = load_small_model()
    plain = fingerprint(model.model)
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(model, config)
    assert is_other(plain, fingerprint(find_model(model))) is False
    with torch.no_grad():
        layer_of(model).modules_to_save["default"].weight.mul_(1.01)
    assert is_other(plain, fingerprint(find_model(model))) is True
    with model.disable_adapter():
        assert is_other(plain, fingerprint(find_model(model))) is False


def test_adapters_of_the_text_model_change_nothing():
    model, _ = load_small_model()
    plain = fingerprint(model.model)
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    assert is_other(plain, fingerprint(find_model(peft.get_peft_model(model, config)))) is False


def test_weights_are_read_again_only_if_something_has_changed(monkeypatch):
    model, processor = adapted()
    reads = []
    monkeypatch.setattr(
        fingerprints, "measured", lambda parts, own=fingerprints.measured: reads.append(1) or own(parts)
    )
    pictures = encode_pictures(model, processor, [examples()[0].picture])
    for _ in range(3):
        answer(model, processor, pictures)
    assert len(reads) == 1
    model.set_adapter("two")
    fingerprint(find_model(model))
    model.set_adapter("one")
    answer(model, processor, pictures)
    assert len(reads) == 2


def test_offloaded_layers_still_tell_adapters_apart():
    accelerate = pytest.importorskip("accelerate")
    model, _ = adapted()
    known = fingerprint(find_model(model))
    accelerate.cpu_offload(find_model(model).multi_modal_projector.base_layer, execution_device="cpu")
    mark = fingerprint(find_model(model))
    assert bool(mark.isnan().any())
    assert is_other(known, mark) is False
    model.set_adapter("two")
    assert is_other(mark, fingerprint(find_model(model))) is True
