import copy

import torch

from ..random_models import PAIR, generate, prefilled, random_model, trimmed


def test_kept_indices_travel_with_the_batch(model):
    _, cache = prefilled(model, PAIR)
    first, second = (kept.tolist() for kept in cache.kept_indices)
    assert first != second
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 0]))
    assert [kept.tolist() for kept in reordered.kept_indices] == [second, first]
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    assert [kept.tolist() for kept in repeated.kept_indices] == [first, first, second, second]
    assert repeated.report().visible_tokens == [20, 20, 5, 5]
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    assert [kept.tolist() for kept in chosen.kept_indices] == [second]
    assert [kept.tolist() for kept in cache.kept_indices] == [first, second]
    sizes = [sizes.tolist() for sizes in cache.kept_sizes]
    assert max(sizes[0]) > 1
    assert [kept.tolist() for kept in reordered.kept_sizes] == sizes[::-1]
    for moved in (reordered, repeated, chosen):  # the mask of decoding goes with them: log sizes where a token is real
        for own in moved.kept.classes:
            for mask, sizes, count in zip(own.mask[:, 0, 0], own.sizes, own.counts, strict=True):
                assert torch.equal(mask[:count], sizes[:count].float().log())
                assert (mask[count:] == torch.finfo(mask.dtype).min).all()


def test_reset_makes_it_as_new(model):
    inputs, cache = prefilled(model, PAIR)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = generate(model, inputs, cache=cache)
    assert torch.equal(again.sequences, trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences)


def test_crop_leaves_the_picture(model):
    _, cache = prefilled(model, PAIR)
    before = [cache.layers[index].keys.clone() for index in (1, 3)]
    length = cache.get_seq_length()
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    assert all(torch.equal(cache.layers[index].keys, keys) for index, keys in zip((1, 3), before, strict=True))


def test_lengths_come_from_a_self_attention_layer_first_layer_or_not():
    model = random_model(layers=4, cross_layers=(0, 2))
    inputs, cache = prefilled(model, PAIR)
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == cache.get_query_offset() == length
    assert cache.get_mask_sizes(1, 0) == (length + 1, 0)
    assert cache.get_seq_length(0) == cache.layers[0].keys.shape[2] != length
