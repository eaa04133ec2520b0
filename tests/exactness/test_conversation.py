"""Several turns on one cache: against one full prefill, and against stock's own cache."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache

from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows

from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from .conversations import PICTURE_INPUTS, Conversation, converse

EXACT = {"top_k_ratio": 1.0}
#: Conversations that begin with a picture: no row is blind, so a full prefill of the whole is the reference. (A blind row reads
#: every picture, later ones too, if they come in the same prefill.)
CONVERSATIONS = {
    "text follows": [[Sample(((6,), 5))], [Sample((4,))], [Sample((1,))], [Sample((7,))]],
    "picture follows": [[Sample(((6,), 5))], [Sample((2, (2,), 3))], [Sample((4,))]],
    "pictures follow": [[Sample(((1,), 2, (3,), 2))], [Sample(((6, 2), 3))], [Sample((3, (8,), 3))], [Sample((2,))]],
    "batch": [
        [Sample(((6,), 5)), Sample(((1, 2), 2))],
        [Sample((4,)), Sample((4,))],
        [Sample((2, (2,), 3)), Sample((1, (3,), 4))],
        [Sample((1,)), Sample((1,))],
    ],
    "batch with different numbers of pictures": [
        [Sample(((6,), 5)), Sample(((1,), 2, (4,), 1))],
        [Sample((2, (2,), 3)), Sample((6,))],
        [Sample((3,)), Sample((3,))],
        [Sample((4,)), Sample(((1,), 3))],
    ],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_exact_conversation_equals_a_full_prefill_and_stock(turns, attention):
    model = random_model(seed=1, attention=attention)
    ours = converse(model, TrimmedCache(model, EXACT), turns)
    stock = converse(model, DynamicCache(config=model.config.text_config), turns)
    for (inputs, output), (_, theirs) in zip(ours, stock, strict=True):
        whole = generate(model, inputs, 5)
        assert torch.equal(whole.sequences, output.sequences)
        assert largest_difference(whole, output) <= 1e-4
        assert torch.equal(theirs.sequences, output.sequences)


def test_blind_text_before_a_later_picture_equals_stock(model):
    turns = [[Sample((3,)), Sample((2, (2,), 1))], [Sample((2, (6,), 3)), Sample((6,))], [Sample((2,)), Sample((2,))]]
    ours = converse(model, TrimmedCache(model, EXACT), turns)
    stock = converse(model, DynamicCache(config=model.config.text_config), turns)
    for (_, output), (_, theirs) in zip(ours, stock, strict=True):
        assert torch.equal(theirs.sequences, output.sequences)
        assert largest_difference(theirs, output) <= 1e-5


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_a_new_picture_is_selected_as_in_a_full_prefill(ratio):
    model = random_model(seed=2, image_size=16)
    turns = [
        [Sample(((6,), 5)), Sample(((1,), 3))],
        [Sample((2, (2,), 3)), Sample((1, (3, 1), 3))],
        [Sample((4,)), Sample((4,))],
    ]
    cache = TrimmedCache(model, {"top_k_ratio": ratio})
    conversation = Conversation(model, 2)
    kept = []
    for turn in turns:
        earlier = conversation.pixels.shape[1]
        output = generate(model, conversation.say(*turn).inputs(earlier), 5, cache=cache)
        whole = trimmed(model, conversation.inputs(), {"top_k_ratio": ratio}, 2)
        kept.append([indices.tolist() for indices in cache.kept_indices])
        if turn is not turns[2]:  # there the full prefill has more voters than the turn that brought the picture
            assert kept[-1] == [indices.tolist() for indices in cache_of(whole).kept_indices]
        assert cache.report().total_tokens == cache_of(whole).report().total_tokens
        assert cache.report().visible_tokens == cache_of(whole).report().visible_tokens
        conversation.hear(output.sequences)
    per_picture = 4 * 17
    assert all(index >= per_picture for sample in kept[1] for index in sample), "the first picture is out of reach"
    assert kept[2] == kept[1], "a turn without a new picture keeps what there is"


def test_several_groups_in_a_follow_up_are_selected_as_in_a_full_prefill(model):
    turns = [[Sample(((6,), 3))], [Sample((1, (2,), 4, (6,), 3))]]
    (_, _), (inputs, output) = converse(model, TrimmedCache(model, {"top_k_ratio": 0.2}), turns)
    whole = trimmed(model, inputs, {"top_k_ratio": 0.2}, 1)
    assert torch.equal(cache_of(output).kept_indices[0], cache_of(whole).kept_indices[0])


@pytest.mark.parametrize("config", [EXACT, {"top_k_ratio": 0.2}])
def test_out_of_reach_pictures_are_freed(model, config):
    cache = TrimmedCache(model, config)
    conversation = Conversation(model)
    sizes, keys = [], []
    for _ in range(5):
        earlier = conversation.pixels.shape[1]
        output = generate(model, conversation.say(Sample(((6,), 3))).inputs(earlier), 3, cache=cache)
        conversation.hear(output.sequences)
        sizes.append(cache.report().cross_kv_bytes / cache.kept.token_bytes / len(cache.cross_layers))
        keys.append(weakref.ref(cache.layers[cache.cross_layers[0]].held_tensors()[0]))
        del output
    assert max(sizes) <= 20, "one picture's worth, however many turns"
    gc.collect()
    assert [ref() is not None for ref in keys] == [False] * 4 + [True]
    assert cache.report().total_tokens == [5 * 20]
    assert all(index >= 4 * 20 for index in cache.kept_indices[0])


@pytest.mark.parametrize("config", [EXACT, {"top_k_ratio": 0.2}])
def test_deep_copies_branch_a_conversation(model, config):
    cache = TrimmedCache(model, config)
    conversation = Conversation(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 5))).inputs(), 4, cache=cache).sequences)
    questions = [Sample((3,)), Sample((2, (2,), 4)), Sample((3,))]
    before = copy.deepcopy(cache)
    answers = []
    for question in questions:
        branch, talk = copy.deepcopy(cache), copy.deepcopy(conversation)
        talk.say(question)
        answers.append(generate(model, talk.inputs(earlier_pictures=1), 5, cache=branch))
        alone = copy.deepcopy(before)
        again = generate(model, talk.inputs(earlier_pictures=1), 5, cache=alone)
        assert torch.equal(answers[-1].sequences, again.sequences)
        if config is EXACT:
            assert torch.equal(answers[-1].sequences, generate(model, talk.inputs(), 5).sequences)
    assert cache.get_seq_length() == before.get_seq_length(), "branches leave the trunk alone"
    assert torch.equal(cache.kept_indices[0], before.kept_indices[0])


def test_prefix_cache_serves_many_prompts(model):
    """A prefix with a picture, read once; its branch repeated for a batch of questions."""
    conversation = Conversation(model)
    prefix = conversation.say(Sample(((6,), 4))).inputs()
    cache = TrimmedCache(model, EXACT)
    with torch.no_grad():
        model(**prefix, **{CACHE: cache}, use_cache=True)
    batch = copy.deepcopy(cache)
    batch.batch_repeat_interleave(3)
    length = prefix["input_ids"].shape[1]
    whole = copy.deepcopy(conversation).say(Sample((4,))).inputs()
    whole = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in whole.items()}
    whole["input_ids"][:, length:] = torch.arange(12).view(3, 4) + 5
    questions = {name: tensor for name, tensor in whole.items() if name not in PICTURE_INPUTS}
    output = generate(model, questions, 5, cache=batch)
    assert torch.equal(generate(model, whole, 5).sequences, output.sequences)
    assert len(batch.kept_indices) == 3
    assert cache.get_seq_length() == length, "the prefix is as it was"


def test_only_the_new_tokens_may_be_given(model):
    cache = TrimmedCache(model, EXACT)
    conversation = Conversation(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 5))).inputs(), 4, cache=cache).sequences)
    inputs = conversation.say(Sample((4,))).inputs(earlier_pictures=1)
    whole = generate(model, conversation.inputs(), 5)
    past = cache.get_seq_length()
    new = dict(inputs, input_ids=inputs["input_ids"][:, past:])
    branch = copy.deepcopy(cache)
    assert torch.equal(generate(model, new, 5, cache=branch).sequences[0, -5:], whole.sequences[0, -5:])
    if not slices_mask_rows():
        return  # the mask must be whole then
    new["cross_attention_mask"] = new["cross_attention_mask"][:, past:]
    assert torch.equal(generate(model, new, 5, cache=cache).sequences[0, -5:], whole.sequences[0, -5:])


def test_beams_and_chunks_in_a_follow_up(model):
    cache = TrimmedCache(model, EXACT)
    conversation = Conversation(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 5))).inputs(), 4, cache=cache).sequences)
    inputs = conversation.say(Sample((7,))).inputs(earlier_pictures=1)
    beams = copy.deepcopy(cache)
    beams.batch_repeat_interleave(3)
    ours = generate(model, inputs, 5, cache=beams, num_beams=3)
    assert torch.equal(generate(model, conversation.inputs(), 5, num_beams=3).sequences, ours.sequences)
    for size in (2, 3):
        if not slices_mask_rows():
            with pytest.raises(ValueError, match="newer versions of transformers"):
                generate(model, inputs, 5, cache=copy.deepcopy(cache), prefill_chunk_size=size)
            continue
        chunks = generate(model, inputs, 5, cache=copy.deepcopy(cache), prefill_chunk_size=size)
        assert torch.equal(generate(model, conversation.inputs(), 5).sequences, chunks.sequences)


@pytest.mark.parametrize("assistance", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_does_not_continue_a_cache(model, assistance):
    """transformers reads the whole conversation again on top of the cache: stock's tokens are wrong, silently."""
    helper = {"prompt_lookup_num_tokens": 3} if assistance == "prompt_lookup_num_tokens" else {"assistant_model": model}
    cache = TrimmedCache(model, EXACT)
    conversation = Conversation(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 5))).inputs(), 4, cache=cache).sequences)
    inputs = conversation.say(Sample((7,))).inputs(earlier_pictures=1)
    with pytest.raises(NotImplementedError, match="cannot continue a cache"):
        generate(model, inputs, 5, cache=cache, **helper)
    again = generate(model, inputs, 5, cache=cache)
    assert torch.equal(generate(model, conversation.inputs(), 5).sequences, again.sequences)


def test_reset_is_as_new(model):
    first = random_inputs(model, [Sample((1, (6,), 5)), Sample((2, (1,), 3))])
    second = random_inputs(model, [Sample((1, (2,), 4))], seed=5)
    cache = TrimmedCache(model, {"top_k_ratio": 0.3})
    generate(model, first, cache=cache)
    cache.reset()
    assert cache.kept_indices == []
    assert cache.get_seq_length() == 0
    assert cache.report().cross_kv_bytes == cache.report().self_kv_bytes == 0
    again = generate(model, second, cache=cache)
    fresh = trimmed(model, second, {"top_k_ratio": 0.3})
    assert torch.equal(again.sequences, fresh.sequences)
    assert torch.equal(cache_of(again).kept_indices[0], cache_of(fresh).kept_indices[0])


def test_select_and_repeat_carry_the_kept_tokens(model):
    inputs = random_inputs(model, [Sample((1, (6,), 5)), Sample((2, (1,), 3)), Sample((2, (2, 3), 3))])
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.3}))
    kept = [indices.tolist() for indices in cache.kept_indices]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert [indices.tolist() for indices in cache.kept_indices] == [kept[2], kept[0]]
    cache.batch_repeat_interleave(2)
    assert [indices.tolist() for indices in cache.kept_indices] == [kept[2], kept[2], kept[0], kept[0]]
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert [indices.tolist() for indices in cache.kept_indices] == [kept[0], kept[2], kept[2], kept[2]]
    assert {len(layer.keys) for layer in cache.layers} == {4}
    assert len(cache.report().kept_tokens) == 4


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_follow_up_that_reads_every_picture_reads_no_padding_between_samples(ratio):
    """A mask of one's own that leaves earlier pictures readable: in a batch each sample gets what it gets alone."""
    model = random_model(seed=5)
    conversation, turns = Conversation(model, 2, seed=3), []
    for turn in ([Sample(((6,), 5)), Sample(((1,), 3))], [Sample((1, (2,), 3)), Sample((1, (3,), 3))]):
        earlier = conversation.pixels.shape[1]
        inputs = conversation.say(*turn).inputs(earlier)
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].cummax(dim=1).values
        turns.append(inputs)

    def play(samples):
        cache, answers = TrimmedCache(model, {"top_k_ratio": ratio}), []
        for inputs in turns:
            own = {name: tensor[samples] for name, tensor in inputs.items()}
            answers.append(generate(model, own, 1 if len(answers) == 0 else 6, cache=cache))
        return cache, answers[-1]

    together, both = play(slice(None))
    counts = [len(indices) for indices in together.kept_indices]
    assert counts[0] != counts[1]
    assert together.report().kept_tokens == counts
    for sample in range(2):
        alone, one = play(slice(sample, sample + 1))
        assert together.kept_indices[sample].tolist() == alone.kept_indices[0].tolist()
        for ours, theirs in zip(both.logits, one.logits, strict=True):
            assert (ours[sample] - theirs[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("merge", [True, False])
def test_padding_between_samples_takes_no_attention_from_new_pictures(merge):
    """Every row reads earlier pictures, of which one sample keeps fewer tokens: its scores are those that it gets alone."""
    model = random_model(seed=5)
    conversation, turns = Conversation(model, 2, seed=3), []
    for turn in ([Sample(((6,), 5)), Sample(((6,), 5))], [Sample(((6,), 3)), Sample(((6,), 3))]):
        earlier = conversation.pixels.shape[1]
        inputs = conversation.say(*turn).inputs(earlier)
        inputs["cross_attention_mask"][:] = 1  # whole tiles, so that no mask of tiles tells what is padding
        turns.append(inputs)

    def second_scores(samples):
        seen = []

        def best(scores, visible):
            seen.append(scores)
            return scores.masked_fill(scores < 1.4 * scores.clamp(min=0).mean(dim=-1, keepdim=True), float("-inf"))

        cache = TrimmedCache(model, TrimConfig(processors=(best,), merge=merge))
        for inputs in turns:
            seen.clear()
            generate(model, {name: tensor[samples] for name, tensor in inputs.items()}, 1, cache=cache)
            counts.append([len(kept) for kept in cache.kept_indices])
        return seen[0]

    counts = []

    together = second_scores(slice(None))
    assert counts[0][0] != counts[0][1]
    for sample in range(2):
        alone = second_scores(slice(sample, sample + 1))
        torch.testing.assert_close(together[sample], alone[0], rtol=1e-4, atol=1e-7)


def test_a_picture_without_a_mask_does_not_bring_back_what_was_out_of_reach(model):
    """Where no mask is given everything that is there may be read; tiles that an earlier turn dropped are not there."""
    inputs = random_inputs(model, [Sample((1, (1,), 4))])
    cache = TrimmedCache(model, EXACT)
    pixels = {name: inputs[name] for name in PICTURE_INPUTS}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a mask is missing is said once in a process
        model(**inputs, **{CACHE: cache})
        before = cache.kept_indices[0].tolist()
        model(input_ids=inputs["input_ids"][:, -3:], **pixels, **{CACHE: cache})
    total = cache.report().total_tokens[0] // 2
    assert 0 < len(before) < total
    assert cache.kept_indices[0].tolist() == [*before, *range(total, 2 * total)]


def test_a_plain_forward_with_a_new_picture_may_not_read_what_is_gone(model):
    """`generate` says so before the model runs; here the prefill itself does."""
    inputs = random_inputs(model, [Sample((1, (1,), 4))])
    cache = TrimmedCache(model, EXACT)
    more = {name: inputs[name] for name in PICTURE_INPUTS} | {
        "input_ids": inputs["input_ids"][:, -3:],
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 3, 2, 4, dtype=torch.long),
    }
    if not slices_mask_rows():  # there the model takes the rows of the new text out itself
        more["cross_attention_mask"] = more["cross_attention_mask"][:, :1].expand(
            -1, more["attention_mask"].shape[1], -1, -1
        )
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        with pytest.raises(ValueError, match="cache has dropped them"):
            model(**more, **{CACHE: cache})


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("left_out", [0, 1])
def test_a_text_turn_that_reads_fewer_pictures_decodes_without_the_others(kv_heads, left_out):
    """The turn's last row decides what decoding reads; the rest is freed, in a batch of samples that keep different numbers."""
    model = random_model(seed=6, heads=4, kv_heads=kv_heads)
    answers = []
    for cache in (TrimmedCache(model, EXACT), DynamicCache(config=model.config.text_config)):
        conversation = Conversation(model, 2, seed=1).say(Sample(((6, 1), 4)), Sample(((1, 2), 4)))
        first = generate(model, conversation.inputs(), 3, cache=cache)
        follow_up = conversation.hear(first.sequences).say(Sample((3,)), Sample((3,))).inputs(2)
        follow_up["cross_attention_mask"][:, -3:, left_out] = 0
        answers.append(generate(model, follow_up, 6, cache=cache))
    ours, stock = answers
    assert torch.equal(ours.sequences, stock.sequences)
    assert largest_difference(ours, stock) <= 1e-5
    # Five tokens a tile; the second picture's begin after the four tiles that the first is padded to.
    begin, tiles = (20, (1, 2)) if left_out == 0 else (0, (4, 1))
    kept = [indices.tolist() for indices in cache_of(ours).kept_indices]
    assert kept == [list(range(begin, begin + 5 * own)) for own in tiles]


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_text_turn_brings_back_no_token_that_the_rule_has_dropped(left_out):
    """Padding between samples points at dropped tokens; it must stay padding when the cache is narrowed."""
    model = random_model(seed=6, image_size=16)
    cache = TrimmedCache(model, {"top_k_ratio": 0.1})
    conversation = Conversation(model, 2, seed=1).say(Sample(((6, 1), 4)), Sample(((1, 1), 4)))
    first = generate(model, conversation.inputs(), 3, cache=cache)
    before = [set(indices.tolist()) for indices in cache.kept_indices]
    assert len(before[0]) != len(before[1])
    follow_up = conversation.hear(first.sequences).say(Sample((3,)), Sample((3,))).inputs(2)
    follow_up["cross_attention_mask"][:, -3:, left_out] = 0
    generate(model, follow_up, 3, cache=cache)
    picture = 4 * 17
    own = set(range(picture, 2 * picture)) if left_out == 0 else set(range(picture))
    assert [set(indices.tolist()) for indices in cache.kept_indices] == [kept & own for kept in before]
