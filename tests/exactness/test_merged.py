"""Every method, dropped and merged, in every way of decoding, against a slow restatement.

`pytest` runs the small profile, `pytest -m slow` the large one. The restatement recomputes the whole text for every token, see
`restatement`; a static cache, a quantized one and assisted decoding are compared with the same.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_plugin import TrimmedCache
from trim_plugin.compat import cache_of, compiles_mllama_decoding, slices_mask_rows

from ..cache.test_static import graph_counter
from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from .conversations import Conversation
from .restatement import Restatement, Turn
from .rules import METHODS
from .strategies import mixed_batches, model_settings, prompts_with_pictures
from .test_every_mode import DECODING, follow_ups
from .test_plain_forward import decode_by_hand

FORMATS = ("int8", "nf4") if importlib.util.find_spec("bitsandbytes") is not None else ()
stores = st.sampled_from([{}, {"prefill_pictures": 1}, {"static": True, "static_bucket": 8, "max_cache_len": 128}])


@dataclasses.dataclass
class Tally:
    """What was compared."""

    examples: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    merged: int = 0
    largest: float = 0.0

    def compare(self, what: str, expected: Any, restated: Restatement, ours: Any) -> None:
        """Tokens, logits, kept tokens and sizes of a generation against the restatement's."""
        self.examples[what] += 1
        self.tokens += ours.sequences.numel()
        self.largest = max(self.largest, largest_difference(expected, ours))
        assert torch.equal(expected.sequences, ours.sequences), what
        scale = max(1.0, *(float(logits.abs().max()) for logits in expected.logits))
        assert largest_difference(expected, ours) <= 1e-5 * scale, what
        if "cross_attention_mask" in restated.inputs:
            self.compare_kept(restated, cache_of(ours))

    def compare_kept(self, restated: Restatement, cache: TrimmedCache) -> None:
        repeats = len(cache.kept_indices) // len(restated.inputs["input_ids"])
        once = len(restated.stories) // len(restated.inputs["input_ids"])
        for sample, (kept, sizes) in enumerate(zip(cache.kept_indices, cache.kept_sizes, strict=True)):
            source = sample // repeats * once  # every copy of a sample keeps the same
            assert kept.tolist() == restated.kept[source]
            assert sizes.tolist() == restated.sizes[source]
            self.merged += int((sizes > 1).sum())

    def __str__(self) -> str:
        kinds = ", ".join(f"{what}: {count}" for what, count in sorted(self.examples.items()))
        return (
            f"{sum(self.examples.values())} comparisons, {self.tokens} tokens, none different, logits within "
            f"{self.largest:.0e}; {self.merged} kept tokens stand for several ({kinds})"
        )


def ways(name: str, merge: bool) -> tuple[dict, dict]:
    """A method, dropped or merged: what the restatement takes and what `TrimConfig` takes."""
    fields, rule = METHODS[name]
    return {"rule": rule, "merge": merge}, {**fields, "merge": merge}


def check_decoding(tally, data, model, seed, name, merge):
    restated, config = ways(name, merge)
    mode = data.draw(st.sampled_from([*DECODING]))
    inputs = random_inputs(model, data.draw(mixed_batches), seed, data.draw(st.booleans()))
    new = data.draw(st.integers(1, 6))
    slow = Restatement(model, inputs, **restated)
    torch.manual_seed(seed)
    expected = slow.generate(new, **DECODING[mode])
    torch.manual_seed(seed)
    store = data.draw(stores)
    ours = trimmed(model, inputs, config | store, new, **DECODING[mode], disable_compile=True)
    tally.compare(mode, expected, slow, ours)


def check_alone(tally, data, model, seed, name, merge):
    restated, config = ways(name, merge)
    mode = data.draw(st.sampled_from(["prompt lookup", "assistant", "by hand"] if slices_mask_rows() else ["by hand"]))
    inputs = random_inputs(model, [data.draw(prompts_with_pictures)], seed)
    repeated = min(data.draw(st.integers(0, 3)), inputs["input_ids"].shape[1] // 2)
    if repeated:  # so that prompt lookup finds something
        inputs["input_ids"][0, -repeated:] = inputs["input_ids"][0, :repeated]
    new = data.draw(st.integers(1, 8))
    slow = Restatement(model, inputs, **restated)
    expected = slow.generate(new)
    if mode == "by hand":
        cache = TrimmedCache(model, config)
        sequences, logits = decode_by_hand(model, inputs, cache, new, data.draw(st.booleans()))
        assert torch.equal(expected.sequences, sequences)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected.logits, logits, strict=True))
        tally.examples[mode] += 1
        tally.compare_kept(slow, cache)
        return
    helper = {"assistant_model": model} if mode == "assistant" else {"prompt_lookup_num_tokens": 3}
    tally.compare(mode, expected, slow, trimmed(model, inputs, config, new, **helper))


def check_conversation(tally, data, model, seed, name, merge):
    restated, config = ways(name, merge)
    how = data.draw(st.sampled_from([{}, {"do_sample": True}]))
    first = data.draw(st.lists(prompts_with_pictures, min_size=1, max_size=2))
    spoken = [first, *([turn] * len(first) for turn in data.draw(follow_ups))]
    format = data.draw(st.sampled_from([None, None, *FORMATS]))
    store = data.draw(stores)
    cache = TrimmedCache(model, config | store | {"kv_quantization": format})
    stored = None if format is None else Stored(format)
    conversation, turns, start = Conversation(model, len(first), seed), [], 0
    second = 0  # the row at which the second turn begins
    masks = data.draw(st.sampled_from(["the processor's", "all that was seen", "without the first picture"]))
    for number, samples in enumerate(spoken):
        earlier = conversation.pixels.shape[1]
        conversation.say(*samples)
        new_inputs, whole = conversation.inputs(earlier), conversation.inputs()
        mask = whole["cross_attention_mask"]
        if masks == "all that was seen":
            mask = mask.cummax(dim=1).values
        elif masks == "without the first picture" and number:
            second = start if number == 1 else second
            mask[:, second:, 0] = 0
        new_inputs["cross_attention_mask"] = whole["cross_attention_mask"] = mask
        length = mask.shape[1]
        turns += [Turn(start, length, mask.shape[2] - earlier)]
        torch.manual_seed(seed + number)
        ours = generate(model, new_inputs, 4, cache=cache, disable_compile=True, **how)
        if stored is not None:
            stored.note(cache)
        slow = Restatement(model, whole, **restated, turns=turns, stored=stored)
        torch.manual_seed(seed + number)
        tally.compare(f"conversation, {format or 'full'}", slow.generate(4, **how), slow, ours)
        conversation.hear(ours.sequences)
        start = ours.sequences.shape[1] - 1  # what was generated last has not been read yet
        turns += [Turn(row, row + 1, 0) for row in range(length, start)]


class Stored:
    """What a quantized cache holds, checked against quantizing what the restatement has merged.

    Both compute keys and values, with rounding errors of their own; where one falls on the other side of a level's border it is
    the cache's value that the restatement goes on with.
    """

    def __init__(self, format: str) -> None:
        self.format = format
        self.held: dict[tuple[int, int, str, int], torch.Tensor] = {}

    def note(self, cache: TrimmedCache) -> None:
        for index in cache.cross_layers:
            for kind in ("keys", "values"):
                states = getattr(cache.layers[index], kind)
                for sample, tokens in enumerate(cache.kept_indices):
                    for place, token in enumerate(tokens.tolist()):
                        self.held[index, sample, kind, token] = states[sample, :, place].clone()

    def __call__(self, layer: int, sample: int, kind: str, tokens: list[int], states: torch.Tensor) -> torch.Tensor:
        expected, step = self.quantized(states)
        found = [self.held.get((layer, sample, kind, token), row) for token, row in zip(tokens, expected, strict=True)]
        if not found:
            return states
        held = torch.stack(found)
        off = (held - expected).abs()
        same = off <= 1e-5 * (1 + expected.abs())
        # Another level, at least a fifth of the widest step away, is as good where a value lies half-way between two: only there.
        between = (held - states).abs() <= (expected - states).abs() + 0.01 * step
        assert bool((same | (between & (off > 0.2 * step))).all())
        return held

    def quantized(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of 64 values of a token share a scale, their largest absolute value; and the widest step of a level."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        rows = states.flatten(1)
        blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64)).view(-1, 64)
        scales = blocks.abs().amax(dim=1, keepdim=True)
        if self.format == "int8":
            rounded, step = (blocks / scales.clamp(min=1e-30) * 127).round() / 127 * scales, scales / 127
        else:
            rounded, step = dequantize_4bit(*quantize_4bit(blocks, blocksize=64, quant_type="nf4")), scales * 0.31

        def unblocked(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(len(rows), -1)[:, : rows.shape[1]].view_as(states)

        return unblocked(rounded), unblocked(step.expand_as(blocks))


CHECKS = (check_decoding, check_decoding, check_alone, check_conversation)
CASES = [(name, merge) for name, (_, rule) in METHODS.items() for merge in ((False, True) if rule else (True,))]


@pytest.fixture(scope="module")
def tally(request):
    """Counts over all methods; printed when the last is done."""
    tally = Tally()
    yield tally
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{tally}")


def run(profile, name, merge, tally):
    profile = settings.get_profile(profile)

    @settings(profile, max_examples=profile.max_examples // 8)
    @given(model_settings, st.integers(0, 2**16), st.sampled_from(CHECKS), st.data())
    def examples(model_kwargs, seed, check, data):
        check(tally, data, random_model(**model_kwargs), seed, name, merge)

    before, merged = sum(tally.examples.values()), tally.merged
    examples()
    assert sum(tally.examples.values()) - before >= profile.max_examples // 8
    assert merge or tally.merged == merged


@pytest.mark.parametrize("name", [name for name, (_, rule) in METHODS.items() if rule])
def test_merging_is_seen(name):
    """Guards every comparison above: dropped and merged, full and quantized differ by far more than rounding."""
    model = random_model(seed=3, image_size=16)
    inputs = random_inputs(model, [Sample((1, (6, 2), 4))])
    fields, _ = METHODS[name]
    runs = [trimmed(model, inputs, {**fields, "merge": merge}, 3) for merge in (False, True)]
    assert largest_difference(*runs) > 1e-3
    runs += [trimmed(model, inputs, {**fields, "kv_quantization": format}, 3) for format in FORMATS]
    assert all(largest_difference(runs[1], quantized) > 1e-4 for quantized in runs[2:])


@pytest.mark.skipif(not compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "samples", [[Sample((1, (6,), 5))], [Sample((1, (6, 1), 4)), Sample((2, (2,), 3)), Sample((6,))]]
)
def test_one_compiled_graph_for_what_is_merged_what_is_dropped_and_what_is_whole(samples, attention):
    torch._dynamo.reset()
    model = random_model(seed=4, attention=attention)
    compile_config, graphs = graph_counter()
    static = {"static": True, "static_bucket": 64, "max_cache_len": 40}
    for seed, (name, merge) in enumerate(
        [("top-k 0.1", True), ("k-center share", True), ("top-p", False), ("exact", True)]
    ):
        restated, config = ways(name, merge)
        inputs = random_inputs(model, samples, seed)
        ours = trimmed(model, inputs, config | static, 8, compile_config=compile_config)
        slow = Restatement(model, inputs, **restated)
        Tally().compare(name, slow.generate(8), slow, ours)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["top-k 0.1", "k-center share"])
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_moved_samples_take_their_sizes_along(name, format):
    """Selected, repeated and reordered between two turns, every sample goes on as it would have alone."""
    model = random_model(seed=5, image_size=16)
    restated, config = ways(name, True)
    cache = TrimmedCache(model, config | {"kv_quantization": format})
    conversation = Conversation(model, 3, seed=2).say(Sample(((6,), 4)), Sample(((1, 3), 2)), Sample(((2,), 3)))
    first = conversation.inputs()
    heard = generate(model, first, 3, cache=cache).sequences
    inputs = conversation.hear(heard).say(*[Sample((3,))] * 3).inputs(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    stored = None if format is None else Stored(format)
    if stored is not None:
        stored.note(cache)
    samples = torch.tensor([1, 2, 2, 1])
    ours = generate(model, {key: tensor[samples] for key, tensor in inputs.items()}, 5, cache=cache)
    start, length = heard.shape[1] - 1, inputs["input_ids"].shape[1]
    prompt = first["input_ids"].shape[1]
    turns = [Turn(0, prompt, 2), *(Turn(row, row + 1, 0) for row in range(prompt, start)), Turn(start, length, 0)]
    whole = {key: tensor[samples] for key, tensor in conversation.inputs().items()}
    slow = Restatement(model, whole, **restated, turns=turns, stored=stored)
    Tally().compare(name, slow.generate(5), slow, ours)


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("name", ["top-k 0.1", "k-center share"])
def test_a_turn_that_reads_fewer_pictures_leaves_the_others_their_sizes(name, left_out):
    model = random_model(seed=6, image_size=16)
    restated, config = ways(name, True)
    cache, conversation = TrimmedCache(model, config), Conversation(model, 2, seed=1)
    first = conversation.say(Sample(((6, 2), 4)), Sample(((1, 3), 4))).inputs()
    heard = generate(model, first, 3, cache=cache).sequences
    inputs = conversation.hear(heard).say(Sample((3,)), Sample((3,))).inputs(2)
    whole = conversation.inputs()
    start, prompt = heard.shape[1] - 1, first["input_ids"].shape[1]
    inputs["cross_attention_mask"][:, start:, left_out] = whole["cross_attention_mask"][:, start:, left_out] = 0
    ours = generate(model, inputs, 5, cache=cache)
    decoded = (Turn(row, row + 1, 0) for row in range(prompt, start))
    turns = [Turn(0, prompt, 2), *decoded, Turn(start, inputs["input_ids"].shape[1], 0)]
    slow = Restatement(model, whole, **restated, turns=turns)
    tally = Tally()
    tally.compare(name, slow.generate(5), slow, ours)
    assert tally.merged > 0


@pytest.mark.parametrize(("name", "merge"), CASES)
def test_every_method(name, merge, tally):
    run("ci", name, merge, tally)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "merge"), CASES)
def test_every_method_at_length(name, merge, tally):
    run("slow", name, merge, tally)
