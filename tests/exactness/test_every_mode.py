"""Random models and prompts in every decoding mode: exact mode differs from the reference in no token.

`pytest` runs 40 examples, `pytest -m slow` 1,000. The reference is stock's own cache, or where stock fails (prompt lookup,
assistants) stock's greedy decoding, or for a conversation one full prefill of the whole.
"""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from trim_plugin import TrimmedCache
from trim_plugin.compat import slices_mask_rows

from ..random_models import Sample, generate, random_inputs, random_model, trimmed
from .conversations import converse
from .strategies import mixed_batches, model_settings, pictures, prompts_with_pictures, texts
from .test_plain_forward import decode_by_hand

EXACT = {"top_k_ratio": 1.0}
DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "top-p, several returned": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "end token": {"eos_token_id": [4, 5, 6], "num_beams": 2, "early_stopping": True},
    "no repeated n-gram": {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "constrained": {"prefix_allowed_tokens_fn": lambda sample, ids: [3 + (len(ids) + step) % 20 for step in range(5)]},
}
ALONE = ("prompt lookup", "assistant", "by hand")
follow_ups = st.lists(
    st.one_of(texts.map(lambda text: Sample((text,))), st.tuples(texts, pictures, texts).map(Sample)),
    min_size=1,
    max_size=3,
)


@dataclasses.dataclass
class Tally:
    """What was compared."""

    examples: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    different: int = 0

    def compare(self, mode, reference, ours):
        self.examples[mode] += 1
        self.tokens += ours.numel()
        if reference.shape != ours.shape:
            self.different += max(reference.numel(), ours.numel())
        else:
            self.different += int((reference != ours).sum())
        assert torch.equal(reference, ours), mode

    def __str__(self):
        modes = ", ".join(f"{mode}: {count}" for mode, count in sorted(self.examples.items()))
        return f"\n{sum(self.examples.values())} comparisons, {self.tokens} tokens compared, {self.different} different ({modes})"


def check_decoding(tally, data, model, seed):
    mode = data.draw(st.sampled_from([*DECODING, "static reference"]))
    inputs = random_inputs(model, data.draw(mixed_batches), seed, data.draw(st.booleans()))
    new = data.draw(st.integers(1, 10))
    runs = []
    for cache in ({}, {"cache_implementation": "trimmed", "cache_config": EXACT}):
        torch.manual_seed(seed)
        mode_settings = DECODING.get(mode, {"use_cache": False} if not cache else {})
        runs.append(generate(model, inputs, new, **mode_settings, **cache).sequences)
    tally.compare(mode, *runs)


def check_alone(tally, data, model, seed):
    mode = data.draw(st.sampled_from(ALONE if slices_mask_rows() else ALONE[2:]))
    inputs = random_inputs(model, [data.draw(prompts_with_pictures)], seed)
    repeated = min(data.draw(st.integers(0, 3)), inputs["input_ids"].shape[1] // 2)
    if repeated:  # so that prompt lookup finds something
        inputs["input_ids"][0, -repeated:] = inputs["input_ids"][0, :repeated]
    new = data.draw(st.integers(1, 12))
    expected = generate(model, inputs, new).sequences
    if mode == "by hand":
        ours, _ = decode_by_hand(model, inputs, TrimmedCache(model, EXACT), new, data.draw(st.booleans()))
    elif mode == "assistant":
        assistant = data.draw(st.sampled_from([model, random_model(seed + 1, layers=3, cross_layers=(1,))]))
        ours = trimmed(model, inputs, EXACT, new, assistant_model=assistant).sequences
    else:
        ours = trimmed(model, inputs, EXACT, new, prompt_lookup_num_tokens=data.draw(st.integers(1, 5))).sequences
    tally.compare(mode, expected, ours)


def check_conversation(tally, data, model, seed):
    first = data.draw(st.tuples(pictures, texts).map(Sample))
    turns = [[first], *([turn] for turn in data.draw(follow_ups))]
    beams = data.draw(st.sampled_from([{}, {"do_sample": True}]))
    torch.manual_seed(seed)
    ours = converse(model, TrimmedCache(model, EXACT), turns, seed, 4, **beams)
    torch.manual_seed(seed)
    stock = converse(model, DynamicCache(config=model.config.text_config), turns, seed, 4, **beams)
    for (inputs, output), (_, theirs) in zip(ours, stock, strict=True):
        tally.compare("conversation", theirs.sequences, output.sequences)
        if not beams:
            tally.compare("conversation, full prefill", generate(model, inputs, 4).sequences, output.sequences)


def run(profile, capsys):
    tally = Tally()
    count = collections.Counter()

    @settings(settings.get_profile(profile))
    @given(
        model_settings,
        st.integers(0, 2**16),
        st.sampled_from([check_decoding, check_alone, check_conversation]),
        st.data(),
    )
    def examples(model_kwargs, seed, check, data):
        count["examples"] += 1
        check(tally, data, random_model(**model_kwargs), seed)

    examples()
    with capsys.disabled():
        print(f"\n{count['examples']} examples,{tally}")
    assert tally.different == 0
    return count["examples"]


def test_every_mode(capsys):
    assert run("ci", capsys) >= settings.get_profile("ci").max_examples


@pytest.mark.slow
def test_every_mode_at_length(capsys):
    assert run("slow", capsys) >= 1000
