"""Every way that `generate` decodes: exact mode against stock, or against greedy decoding where stock fails."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import GenerationConfig, MllamaForCausalLM, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from trim_plugin import TrimmedCache
from trim_plugin.compat import cache_of, slices_mask_rows

from ..random_models import VOCABULARY, Sample, generate, largest_difference, random_inputs, random_model, trimmed

EXACT = {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 1.0}}
SINGLE = Sample((2, (6,), 5, (2,), 6))
BATCH = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4))]


@pytest.fixture(scope="module")
def shared_model():
    return random_model()


@pytest.fixture(scope="module")
def batch(shared_model):
    return random_inputs(shared_model, BATCH)


@pytest.fixture(scope="module")
def single(shared_model):
    return random_inputs(shared_model, [SINGLE])


def both(model, inputs, **settings):
    """The same seeded generation with stock's cache and with an exact trimmed one."""
    runs = []
    for extra in ({}, EXACT):
        torch.manual_seed(7)
        runs.append(generate(model, inputs, **settings, **extra))
    return runs


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "length_penalty": 0.5,
        "early_stopping": True,
    },
    "beam sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "sampling, several returned": {"num_return_sequences": 3, "do_sample": True},
    "bad words": {"bad_words_ids": [[5], [6, 7]], "num_beams": 2},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "end token": {"eos_token_id": [7, 8, 9]},
    "no cache": {"use_cache": False},
    "minimum length": {"min_new_tokens": 4, "eos_token_id": 9, "num_beams": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("samples", [BATCH, [SINGLE], [Sample((9,)), Sample((5,))]], ids=["batch", "single", "text"])
def test_exact_equals_stock(shared_model, samples, mode):
    inputs = random_inputs(shared_model, samples)
    stock, ours = both(shared_model, inputs, **MODES[mode])
    assert torch.equal(stock.sequences, ours.sequences)
    if mode == "guidance":  # the logits hold −inf
        return
    assert largest_difference(stock, ours) <= 1e-5


@pytest.mark.parametrize("mode", ["beams", "beams, several returned"])
def test_trimmed_beams_equal_one_beam_at_a_time(shared_model, batch, mode):
    """A trimmed beam's score is what a trimmed forward over prompt and continuation gives: beams keep their own tokens."""
    ours = trimmed(shared_model, batch, {"top_k_ratio": 0.2}, output_scores=True, **MODES[mode])
    length = batch["input_ids"].shape[1]
    repeats = len(ours.sequences) // len(batch["input_ids"])
    for index, sequence in enumerate(ours.sequences):
        alone = {name: tensor[index // repeats][None] for name, tensor in batch.items()}
        forced = trimmed(
            shared_model,
            alone,
            {"top_k_ratio": 0.2},
            # A prefix of one allowed token each forces the beam's continuation.
            prefix_allowed_tokens_fn=lambda _, ids, wanted=sequence: [int(wanted[len(ids)])],
        )
        chosen = sequence[length:]
        steps = zip(forced.logits, chosen, strict=True)
        score = sum(logits.log_softmax(-1)[0, token] for logits, token in steps)
        penalty = MODES[mode].get("length_penalty", 1.0)
        assert float(ours.sequences_scores[index]) == pytest.approx(float(score) / len(chosen) ** penalty, abs=1e-4)


def test_cache_of_beams_holds_the_beams(shared_model, batch):
    cache = cache_of(trimmed(shared_model, batch, {"top_k_ratio": 0.2}, num_beams=3))
    greedy = cache_of(trimmed(shared_model, batch, {"top_k_ratio": 0.2}))
    assert len(cache.kept_indices) == 6
    for beam, kept in enumerate(cache.kept_indices):
        assert torch.equal(kept, greedy.kept_indices[beam // 3])
    assert cache.report().kept_tokens == [n for n in greedy.report().kept_tokens for _ in range(3)]


# -- assisted decoding -----------------------------------------------------------------------------------------------

needs_sliced_rows = pytest.mark.skipif(not slices_mask_rows(), reason="this transformers prepares one mask row only")
#: A continuation that the prompt suggests, and one whose candidates contain the image token.
LOOKUP_PROMPTS = [Sample((2, (6,), 5, (2,), 6)), Sample(((2,), 12)), Sample((4, (1,), 9, (3,), 8))]


@pytest.mark.parametrize("sample", LOOKUP_PROMPTS)
@pytest.mark.parametrize("ratio", [1.0, 0.2])
@needs_sliced_rows
def test_prompt_lookup_equals_greedy(shared_model, sample, ratio):
    inputs = random_inputs(shared_model, [sample], seed=3)
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, 1:4]  # so that something is found
    greedy = trimmed(shared_model, inputs, {"top_k_ratio": ratio}, 16)
    ours = trimmed(shared_model, inputs, {"top_k_ratio": ratio}, 16, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, ours.sequences)
    assert largest_difference(greedy, ours) <= 1e-5
    assert torch.equal(cache_of(greedy).kept_indices[0], cache_of(ours).kept_indices[0])
    if ratio == 1.0:
        assert torch.equal(generate(shared_model, inputs, 16).sequences, ours.sequences)


def test_stock_prompt_lookup_fails_with_a_picture(shared_model, single):
    """When this fails, transformers has been mended: then docs/upstream.md has an entry to lose."""
    inputs = dict(single, input_ids=single["input_ids"].clone())
    picture = int((inputs["input_ids"][0] == VOCABULARY).nonzero()[0])
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, picture - 1]  # its continuation is the image token
    with pytest.raises((IndexError, RuntimeError, TypeError)):
        generate(shared_model, inputs, 16, prompt_lookup_num_tokens=4)


@pytest.mark.skipif(slices_mask_rows(), reason="this transformers can do it")
def test_where_transformers_cannot_verify_candidates_the_error_says_so(shared_model, single):
    with pytest.raises(NotImplementedError, match="Install a newer transformers"):
        trimmed(shared_model, single, {}, prompt_lookup_num_tokens=4)
    trimmed(shared_model, single, {})


def test_prompt_lookup_without_pictures_equals_greedy(shared_model):
    inputs = random_inputs(shared_model, [Sample((14,))])
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, 1:4]
    ours = trimmed(shared_model, inputs, {"top_k_ratio": 0.5}, 16, prompt_lookup_num_tokens=4)
    assert torch.equal(generate(shared_model, inputs, 16).sequences, ours.sequences)


@needs_sliced_rows
@pytest.mark.parametrize("ratio", [1.0, 0.2])
@pytest.mark.parametrize("kind", ["itself", "smaller", "other picture size", "text only"])
def test_assistant_equals_greedy(shared_model, single, ratio, kind):
    if kind == "itself":
        assistant = random_model()
    elif kind == "smaller":
        assistant = random_model(layers=3, cross_layers=(1,))
    elif kind == "other picture size":
        assistant = random_model(layers=3, cross_layers=(1,), image_size=16)
    else:
        assistant = MllamaForCausalLM(shared_model.config.text_config).eval()
        assistant.generation_config.eos_token_id = None
    # Otherwise an assistant that is unsure of its guess stops guessing, which says nothing of what it sees.
    assistant.generation_config.assistant_confidence_threshold = 0.0
    greedy = trimmed(shared_model, single, {"top_k_ratio": ratio}, 16)
    forwards = []
    counter = shared_model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    ours = trimmed(shared_model, single, {"top_k_ratio": ratio}, 16, assistant_model=assistant)
    counter.remove()
    assert torch.equal(greedy.sequences, ours.sequences)
    assert torch.equal(cache_of(greedy).kept_indices[0], cache_of(ours).kept_indices[0])
    if kind == "itself":  # it sees the picture, trimmed alike, and so guesses everything right
        assert len(forwards) <= 16 // 2


@needs_sliced_rows
def test_assistant_with_a_cache_made_by_hand(shared_model, single):
    cache = TrimmedCache(shared_model, {"top_k_ratio": 0.2})
    ours = generate(shared_model, single, 12, cache=cache, assistant_model=random_model(layers=3, cross_layers=(1,)))
    assert torch.equal(trimmed(shared_model, single, {"top_k_ratio": 0.2}, 12).sequences, ours.sequences)


@needs_sliced_rows
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_assisted_sampling_repeats_itself_and_follows_the_models_distribution(shared_model, single, ratio):
    """Its draws are not stock's (docs/errors.md), since the prompt is read alone first; but a seed fixes them, and the first
    token's frequencies are the probabilities that the trimmed cache gives it."""
    settings = {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 4, "temperature": 1.0}

    def drawn(seed, new):
        torch.manual_seed(seed)
        return trimmed(shared_model, single, {"top_k_ratio": ratio}, new, **settings)

    assert torch.equal(drawn(3, 12).sequences, drawn(3, 12).sequences)
    firsts = torch.stack([drawn(seed, 1).sequences[0, -1] for seed in range(200)])
    logits = trimmed(shared_model, single, {"top_k_ratio": ratio}, 1).logits[0][0]
    best = logits.topk(4)
    expected = best.values.softmax(-1)
    found = torch.stack([(firsts == token).float().mean() for token in best.indices])
    assert float(found.sum()) == pytest.approx(1.0)
    assert (found - expected).abs().max() < 0.12


# -- around the loop -------------------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_streamer_gets_the_sequence(shared_model, single, ratio):
    streamer = Collector()
    ours = trimmed(shared_model, single, {"top_k_ratio": ratio}, streamer=streamer)
    assert streamer.tokens == ours.sequences[0].tolist()
    assert streamer.ended == 1


def test_streamer_that_raises_leaves_the_model_usable(shared_model, single):
    class Impatient(Collector):
        def put(self, value):
            super().put(value)
            if len(self.tokens) > single["input_ids"].shape[1] + 2:
                raise InterruptedError

    before = trimmed(shared_model, single, {"top_k_ratio": 0.2})
    with pytest.raises(InterruptedError):
        trimmed(shared_model, single, {"top_k_ratio": 0.2}, streamer=Impatient())
    assert torch.equal(before.sequences, trimmed(shared_model, single, {"top_k_ratio": 0.2}).sequences)


def test_stopping_criteria(shared_model, single):
    length = single["input_ids"].shape[1]

    def after_three(input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3, dtype=torch.bool)

    stock, ours = both(shared_model, single, stopping_criteria=StoppingCriteriaList([after_three]))
    assert torch.equal(stock.sequences, ours.sequences)
    assert ours.sequences.shape[1] == length + 3


def test_max_time(shared_model, single):
    started = time.monotonic()
    ours = trimmed(shared_model, single, {"top_k_ratio": 0.2}, 100_000, max_time=0.2)
    assert time.monotonic() - started < 10
    assert ours.sequences.shape[1] < 100_000


def test_constrained_decoding(shared_model, batch):
    def even_tokens(sample, input_ids):
        return list(range(4 + sample, VOCABULARY, 2))

    stock, ours = both(shared_model, batch, prefix_allowed_tokens_fn=even_tokens)
    assert torch.equal(stock.sequences, ours.sequences)
    new = ours.sequences[:, batch["input_ids"].shape[1] :]
    assert bool((new[0] % 2 == 0).all())
    assert bool((new[1] % 2 == 1).all())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs(attention):
    model = random_model(attention=attention)
    inputs = random_inputs(model, BATCH)
    wanted = {"output_scores": True, "output_hidden_states": True, "output_attentions": attention == "eager"}
    stock, ours = both(model, inputs, **wanted)
    assert largest_difference(stock, ours) <= 1e-5
    for mine, theirs in zip(ours.hidden_states, stock.hidden_states, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    if attention == "eager":
        prefill = zip(ours.attentions[0], stock.attentions[0], strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in prefill if a is not None)
        kept = max(cache_of(ours).report().kept_tokens)
        widths = {weights.shape[-1] for weights in ours.attentions[-1] if weights is not None}
        assert kept in widths, "decoding steps return attention over the cached tokens"


def test_prefill_in_chunks(shared_model, single):
    whole = generate(shared_model, single)
    if slices_mask_rows():
        fits = trimmed(shared_model, single, {"top_k_ratio": 1.0}, prefill_chunk_size=64)
        assert torch.equal(whole.sequences, fits.sequences)
    text = random_inputs(shared_model, [Sample((11,)), Sample((7,))])
    in_chunks = trimmed(shared_model, text, {}, prefill_chunk_size=3)
    assert torch.equal(generate(shared_model, text, prefill_chunk_size=3).sequences, in_chunks.sequences)
    with pytest.raises(ValueError, match="would cut a prompt with pictures into pieces"):
        trimmed(shared_model, single, {}, prefill_chunk_size=4)


def test_generation_config_object(shared_model, single):
    config = GenerationConfig(
        max_new_tokens=8,
        cache_implementation="trimmed",
        cache_config={"top_k_ratio": 0.2},
        return_dict_in_generate=True,
    )
    first = shared_model.generate(**single, generation_config=config)
    second = shared_model.generate(**single, generation_config=config)
    assert torch.equal(first.sequences, second.sequences)
    assert config.cache_config == {"top_k_ratio": 0.2}
    assert torch.equal(first.sequences, trimmed(shared_model, single, {"top_k_ratio": 0.2}).sequences)
