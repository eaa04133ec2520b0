"""What users call the cache, in every way to use one: as their transformers has it, and without a deprecation of our own making.

Up to 5.23 it is `past_key_values`. From 5.24 on it is `cache`, and the former name is an alias that warns.
"""

from __future__ import annotations

import contextlib
import logging
import warnings

import pytest
import torch
from transformers.utils import logging as transformers_logging

import trim_plugin
from trim_plugin import KCenter, TrimmedCache, encode_pictures
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows
from trim_plugin.embedded import ask, examples, load_small_model

from ..random_models import PAIR, Sample, generate, random_inputs, random_model, trimmed

pytestmark = pytest.mark.former_names

NAMES = list(dict.fromkeys(["past_key_values", CACHE]))
CONFIG = {"top_k_ratio": 0.2}
ONE = [Sample((1, (6,), 6))]


@pytest.fixture(scope="module")
def model():
    return random_model()


@contextlib.contextmanager
def told(name):
    """transformers says that a name is deprecated where it is one, and nowhere else."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    deprecated = [str(one.message) for one in seen if "past_key_values" in str(one.message)]
    assert bool(deprecated) is (name != CACHE)


def is_in(output, cache):
    """The output has the cache under every name, as an attribute, as an item and as a member."""
    return all(getattr(output, name) is output[name] is cache and name in output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_generate(model, name):
    inputs, cache = random_inputs(model, PAIR), TrimmedCache(model, CONFIG)
    expected = trimmed(model, inputs, CONFIG)
    with told(name):
        ours = generate(model, inputs, **{name: cache})
    assert torch.equal(ours.sequences, expected.sequences)
    assert is_in(ours, cache)
    assert isinstance(cache_of(expected), TrimmedCache)
    assert is_in(expected, cache_of(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["whole", "without a head"])
def test_a_plain_forward(model, name, part):
    inputs, cache = random_inputs(model, PAIR), TrimmedCache(model, CONFIG)
    called = model if part == "whole" else model.model
    expected = trimmed(model, inputs, CONFIG, new=2)
    token = expected.sequences[:, -2:-1]
    with torch.no_grad(), told(name):
        output = called(**inputs, **{name: cache}, use_cache=True)
        assert is_in(output, cache)
        output = called(input_ids=token, attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
                        **{name: cache}, use_cache=True)  # fmt: skip
    logits = output.logits if part == "whole" else model.lm_head(output.last_hidden_state)
    assert float((logits[:, -1].detach() - expected.logits[1]).abs().max()) < 1e-4
    assert [one.tolist() for one in cache.kept_indices] == [one.tolist() for one in cache_of(expected).kept_indices]


@pytest.mark.parametrize("name", list(dict.fromkeys(["cache", *NAMES])))
@pytest.mark.parametrize("pictures", [None, 1])
def test_prefill(model, name, pictures):
    """Its own argument is called `cache` in every version."""
    inputs, cache = random_inputs(model, PAIR), TrimmedCache(model, {**CONFIG, "prefill_pictures": pictures})
    output = trim_plugin.prefill(model, **inputs, **{name: cache})
    assert is_in(output, cache)
    expected = trimmed(model, inputs, CONFIG, new=1)
    assert float((output.logits[:, -1] - expected.logits[0]).abs().max()) < 1e-4


@pytest.mark.skipif(not slices_mask_rows(), reason="this transformers has no assisted decoding with pictures")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding(model, name, helper):
    inputs, cache = random_inputs(model, ONE), TrimmedCache(model, CONFIG)
    how = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": random_model(seed=1)}
    with told(name):
        ours = generate(model, inputs, **{name: cache}, **how)
    assert torch.equal(ours.sequences, trimmed(model, inputs, CONFIG).sequences)
    assert is_in(ours, cache)


def two_turns(model):
    cache = TrimmedCache(model, CONFIG)
    inputs = random_inputs(model, ONE)
    first = generate(model, inputs, 4, cache=cache).sequences
    more = torch.nn.functional.pad(first, (0, 2), value=5)
    mask = inputs["cross_attention_mask"]
    rows = mask[:, -1:].expand(-1, more.shape[1] - mask.shape[1], -1, -1)
    follow_up = {"attention_mask": torch.ones_like(more), "cross_attention_mask": torch.cat([mask, rows], dim=1)}
    generate(model, {"input_ids": more, **follow_up}, 4, cache=cache)


def encoded(_):
    small, processor = load_small_model()
    example = examples()[0]
    pictures = encode_pictures(small, processor, [example.picture], rule=KCenter(0.25), tower_share=0.5)
    cache = TrimmedCache(small, CONFIG, pictures=pictures)
    small.generate(**pictures.inputs(processor, example.question), **{CACHE: cache}, max_new_tokens=2)
    trim_plugin.visualize(small, ask(processor, example.question, example.picture))


def by_hand(model):
    inputs, cache = random_inputs(model, ONE), TrimmedCache(model, CONFIG)
    with torch.no_grad():
        output = model(**inputs, **{CACHE: cache}, use_cache=True)
        model(input_ids=output.logits[:, -1:].argmax(-1), **{CACHE: cache_of(output)}, use_cache=True)


#: Ways to use a trimmed cache, each as our own code and this documentation write it.
WAYS = {
    "greedy": lambda model: trimmed(model, random_inputs(model, PAIR), CONFIG, 4),
    "beams": lambda model: trimmed(model, random_inputs(model, PAIR), CONFIG, 4, num_beams=2),
    "sampling": lambda model: trimmed(
        model, random_inputs(model, PAIR), CONFIG, 4, do_sample=True, num_return_sequences=2
    ),
    "micro-batches": lambda model: trimmed(model, random_inputs(model, PAIR), {**CONFIG, "prefill_pictures": 1}, 4),
    "static": lambda model: trimmed(
        model, random_inputs(model, PAIR), {**CONFIG, "static": True}, 4, disable_compile=True
    ),
    "exact": lambda model: trimmed(model, random_inputs(model, PAIR), {"top_k_ratio": 1.0}, 4),
    "fewer patches": lambda model: trimmed(model, random_inputs(model, PAIR), {**CONFIG, "tower_share": 0.6}, 4),
    "text alone": lambda model: trimmed(model, random_inputs(model, [Sample((4,))]), CONFIG, 4),
    "two turns": two_turns,
    "by hand": by_hand,
    "encoded pictures": encoded,
}
if slices_mask_rows():
    WAYS |= {
        "prompt lookup": lambda model: trimmed(model, random_inputs(model, ONE), CONFIG, 8, prompt_lookup_num_tokens=3),
        "assistant": lambda model: trimmed(
            model, random_inputs(model, ONE), CONFIG, 8, assistant_model=random_model(seed=1)
        ),
    }


@pytest.fixture
def logged():
    """What transformers logs, those warnings included that it gives once a process."""
    transformers_logging.warning_once.cache_clear()
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    yield records
    library.removeHandler(handler)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_deprecated_is_used(model, way, logged):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        # transformers 5.17's own: its vision encoder calls its layers by a name that it has deprecated.
        warnings.filterwarnings("ignore", message="`hidden_state` is deprecated", category=FutureWarning)
        WAYS[way](model)
    said = [one.getMessage() for one in logged if "deprecated" in one.getMessage()]
    # How transformers calls an assistant's own `generate`.
    assert [one for one in said if not one.startswith("Passing `generation_config` together with")] == []


def test_what_is_logged_is_seen(model, logged):
    """The test above would see it."""
    if CACHE == "cache":
        assert trimmed(model, random_inputs(model, ONE), CONFIG, 2).past_key_values is not None
        assert any("deprecated" in one.getMessage() for one in logged)
