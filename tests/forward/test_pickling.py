"""Caches and models in files, and in other processes."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import trim_plugin
from trim_plugin import KCenter, TrimmedCache, encode_pictures
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.forward.hooks import before_layer
from trim_plugin.generation.checks import has_hooks

from ..exactness.conversations import Conversation
from ..random_models import PAIR, Sample, generate, largest_difference, random_inputs, random_model, trimmed

ROOT = Path(__file__).parents[2]


def pickled(value):
    # bandit: written here
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def same_answers(first, second):
    assert torch.equal(first.sequences, second.sequences)
    assert largest_difference(first, second) == 0.0


def begun(model, config):
    """A conversation about a picture, and the cache that holds its first turn."""
    conversation, cache = Conversation(model), TrimmedCache(model, config)
    inputs = conversation.say(Sample((2, (6,), 4))).inputs()
    conversation.hear(generate(model, inputs, cache=cache, disable_compile=True).sequences)
    return conversation, cache


@pytest.mark.parametrize("through", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize(
    "config",
    [
        {"top_k_ratio": 0.2},
        {"top_k_ratio": 1.0},
        {"processors": [KCenter(0.3)], "merge": False},
        {"top_k_ratio": 0.2, "static": True, "max_cache_len": 64},
    ],
    ids=str,
)
def test_a_conversation_goes_on_from_a_file(model, config, through):
    conversation, cache = begun(model, config)
    read = through(cache)
    assert repr(read) == repr(cache)
    assert all(map(torch.equal, read.kept_indices, cache.kept_indices))
    assert all(map(torch.equal, read.kept_sizes, cache.kept_sizes))
    follow_up = conversation.say(Sample((3, (2,), 2))).inputs(earlier_pictures=1)
    expected = generate(model, follow_up, cache=cache, disable_compile=True)
    same_answers(generate(model, follow_up, cache=read, disable_compile=True), expected)
    assert all(map(torch.equal, read.kept_indices, cache.kept_indices))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_tokens_go_on_from_a_file(model, kind):
    pytest.importorskip("bitsandbytes")
    conversation, cache = begun(model, {"top_k_ratio": 0.3, "kv_quantization": kind})
    read = pickled(cache)
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    same_answers(generate(model, follow_up, cache=read), generate(model, follow_up, cache=cache))


def test_beams_go_on_from_a_file(model):
    """Copies of a sample share its pictures in a file, too."""
    inputs = random_inputs(model, PAIR)
    cache = cache_of(trimmed(model, inputs, {}, num_beams=3, num_return_sequences=3))
    read = pickled(cache)
    assert read.report() == cache.report()
    step = torch.arange(3, 9)[:, None]
    for one in (cache, read):
        one.reorder_cache(torch.tensor([1, 0, 2, 5, 5, 3]))
    with torch.no_grad():
        logits = [model(input_ids=step, **{CACHE: one}, use_cache=True).logits for one in (cache, read)]
    assert torch.equal(*logits)


def test_a_model_that_was_loaded_again_takes_a_cache_from_a_file(model):
    conversation, cache = begun(model, {})
    read = pickled(cache)
    again = random_model()
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    expected = generate(model, follow_up, cache=cache)
    assert not has_hooks(again.model.language_model)
    same_answers(generate(again, follow_up, cache=read), expected)
    with pytest.raises(ValueError, match="made for another model"):
        generate(model, conversation.say(Sample((3,))).inputs(earlier_pictures=1), cache=read)
    assert before_layer in again.model.language_model.layers[1]._forward_pre_hooks.values()


@pytest.mark.parametrize("how", ["bind", "prefill", "a forward with hooks"])
def test_plain_forwards_go_on_from_a_file(model, how):
    conversation, cache = begun(model, {})
    read, again = pickled(cache), random_model()
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    past = cache.get_seq_length()
    follow_up["input_ids"] = follow_up["input_ids"][:, past:]
    if how == "bind":
        read.bind(again)
        read.bind(again)
    elif how == "a forward with hooks":
        TrimmedCache(again)
    outputs = []
    for own, used in ((model, cache), (again, read)):
        if how == "prefill":
            outputs.append(trim_plugin.prefill(own, used, **follow_up).logits)
        else:
            with torch.no_grad():
                outputs.append(own(**follow_up, **{CACHE: used}, use_cache=True).logits)
    assert torch.equal(*outputs)


def test_a_forward_without_hooks_does_not_read_a_cache_from_a_file(model):
    _, cache = begun(model, {})
    trim_plugin.detach(model)
    with pytest.raises(RuntimeError, match=r"read from a file .* Call cache.bind\(model\)"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), **{CACHE: pickled(cache)}, use_cache=True)


@pytest.mark.parametrize("other", [{"layers": 6}, {"cross_layers": (0, 3)}, {"heads": 2, "kv_heads": 1}])
def test_a_model_of_another_shape_does_not_take_a_cache_from_a_file(model, other):
    _, cache = begun(model, {})
    read, wrong = pickled(cache), random_model(**other)
    with pytest.raises(ValueError, match="made for another model"):
        generate(wrong, random_inputs(wrong, [Sample((3,))]), cache=read)
    assert not has_hooks(wrong.model.language_model)
    read.bind(model)


def test_encoded_pictures_that_wait_are_in_the_file():
    model, processor = load_small_model(torch.float32)
    example = examples()[0]
    pictures = encode_pictures(model, processor, [example.picture])
    inputs = pictures.inputs(processor, example.question)
    caches = [change(TrimmedCache(model, {}, pictures=pictures)) for change in (lambda cache: cache, pickled)]
    same_answers(*(generate(model, inputs, 4, cache=cache) for cache in caches))


@pytest.mark.parametrize("config", [{}, {"static": True, "max_cache_len": 64}], ids=str)
def test_a_cache_is_read_onto_another_device(model, config):
    _, cache = begun(model, config)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    read = torch.load(file, weights_only=False, map_location="meta")
    for index in cache.cross_layers:
        layer = read.layers[index]
        assert {tensor.device.type for tensor in layer.held_tensors()} == {"meta"}
        assert layer.device.type == "meta"


WITHOUT_THE_PLUGIN = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "trim_plugin":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse())
    import pickle, torch
    try:
        import trim_plugin
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("it is there")
    folder = sys.argv[1]
    inputs = torch.load(folder + "/inputs.pt")
    expected = torch.load(folder + "/expected.pt")
    with open(folder + "/model.pickle", "rb") as file:
        models = [pickle.load(file), torch.load(folder + "/model.pt", weights_only=False)]
    for model in models:
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, expected), (found, expected)
    assert not any(name.partition(".")[0] == "trim_plugin" for name in sys.modules)
"""


def test_a_model_saved_whole_is_loaded_without_the_plugin(model, tmp_path):
    inputs = random_inputs(model, PAIR)
    expected = generate(model, inputs).sequences
    trimmed(model, inputs, {"tower_share": 0.6})  # hooks on layers, models and the tower
    trimmed(model, inputs, {"static": True}, disable_compile=True)
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(expected, tmp_path / "expected.pt")
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = [sys.executable, "-c", textwrap.dedent(WITHOUT_THE_PLUGIN), str(tmp_path)]
    path = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("through", [pickled, saved])
def test_a_model_saved_whole_trims_as_before(model, through):
    inputs = random_inputs(model, PAIR)
    stock = generate(model, inputs)
    expected, thinned = (trimmed(model, inputs, config) for config in ({}, {"tower_share": 0.6}))
    read = through(model)
    same_answers(generate(read, inputs), stock)
    for _ in range(2):
        same_answers(trimmed(read, inputs, {}), expected)
        same_answers(trimmed(read, inputs, {"tower_share": 0.6}), thinned)
        read = through(read)
    trimmed(read, inputs, {"tower_share": 0.6})
    trim_plugin.detach(read)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in read.modules())
