import copy
import gc
import warnings
import weakref

import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows

from ..random_models import PAIR, Sample, generate, prefilled, random_inputs, random_model, trimmed
from ..reference_rule import check_kept


def test_all_cross_layers_hold_the_kept_tokens_and_project_no_more(model):
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    projected: dict[int, list[int]] = {1: [], 3: []}
    for index, counts in projected.items():
        for name in ("k_proj", "v_proj"):
            module = getattr(model.model.language_model.layers[index].cross_attn, name)
            module.register_forward_hook(
                lambda _module, args, _output, counts=counts: counts.append(args[0].shape[:-1].numel())
            )
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.1}, 4))
    kept = cache.kept_indices[0].tolist()
    assert [cache.layers[index].keys.shape[2] for index in projected] == [len(kept)] * 2
    assert [cache.layers[index].values.shape[2] for index in projected] == [len(kept)] * 2
    assert projected == {1: [20, 20], 3: [len(kept)] * 2}
    assert len(kept) < 20
    check_kept(cache.kept_indices, model, inputs, 0.1)


def test_the_pruned_states_exist_once_and_are_gone_after_the_prefill():
    model = random_model(layers=6, cross_layers=(1, 3, 5))
    cache = TrimmedCache(model, {"top_k_ratio": 0.1})
    given, pointers = [], []

    def note(_layer, _args, kwargs):
        given.append(weakref.ref(kwargs["cross_attention_states"]))
        pointers.append(kwargs["cross_attention_states"].data_ptr())

    for index in (1, 3, 5):  # after the cache's own hooks, so this sees what the layers get
        model.model.language_model.layers[index].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**random_inputs(model, PAIR), **{CACHE: cache}, use_cache=True)
    assert pointers[0] != pointers[1] == pointers[2]
    gc.collect()
    assert cache.turn is None
    assert all(state() is None for state in given)


def test_exact_mode_lays_keys_and_values_out_as_decoding_reads_them(model):
    _, cache = prefilled(model, [Sample((1, (6,), 6))], 1.0)
    layers = [cache.layers[index] for index in cache.cross_layers]
    assert all(layer.keys.is_contiguous() and layer.values.is_contiguous() for layer in layers)


def test_pictures_without_a_mask_are_read_whole_and_warned_about_once(model, monkeypatch):
    from trim_plugin.selection import visibility

    monkeypatch.setattr(visibility, "_warned_without_mask", False)
    inputs = random_inputs(model, [Sample(((6,), 6))])
    whole = dict(inputs, cross_attention_mask=torch.ones_like(inputs["cross_attention_mask"]))
    del inputs["cross_attention_mask"]
    with pytest.warns(UserWarning, match="without cross_attention_mask"):
        ours = trimmed(model, inputs, {"top_k_ratio": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trimmed(model, inputs, {"top_k_ratio": 1.0})
    assert torch.equal(ours.sequences, generate(model, whole).sequences)


def test_the_rule_sees_the_queries_that_attention_uses(model):
    """They are computed twice: by the layer, and by the hook, which keeps no tensor of the layer's."""
    queries = []
    model.model.language_model.layers[1].cross_attn.q_norm.register_forward_hook(
        lambda _module, _args, output: queries.append(output)
    )
    prefilled(model, PAIR)
    by_attention, by_the_hook = queries
    assert torch.equal(by_attention, by_the_hook)


def test_later_layers_see_the_mask_and_states_of_what_is_kept(model):
    seen = {}
    TrimmedCache(model)  # its hooks first, so that these see what the layers get
    for index in (1, 3):
        model.model.language_model.layers[index].register_forward_pre_hook(
            lambda _layer, _args, kwargs, index=index: seen.update(
                {index: (kwargs["cross_attention_states"], kwargs["cross_attention_mask"])}
            ),
            with_kwargs=True,
        )
    _, cache = prefilled(model, [Sample((1, (6,), 6))], 0.1, merge=False)
    kept = cache.kept_indices[0]
    (all_states, all_mask), (states, mask) = seen[1], seen[3]
    assert all_states.shape[-2] == 20
    assert torch.equal(states, all_states.reshape(1, 20, -1)[:, kept])
    assert torch.equal(mask, all_mask[..., kept])


def test_exact_mode_hands_every_layer_what_stock_would(model):
    seen = []
    TrimmedCache(model)
    for index in (1, 3):
        model.model.language_model.layers[index].register_forward_pre_hook(
            lambda _layer, _args, kwargs: seen.append(kwargs["cross_attention_mask"]), with_kwargs=True
        )
    prefilled(model, PAIR, 1.0)
    assert seen[0] is seen[1]
    stock = []
    handle = model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _layer, _args, kwargs: stock.append(kwargs["cross_attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**random_inputs(model, PAIR), use_cache=True)
    handle.remove()
    assert torch.equal(seen[0], stock[0])


# -- turns without pictures ---------------------------------------------------------------------------------------

#: Two pictures that the end of the prompt reads both, 20 visual tokens each; and one that it does not read any more.
SIDE_BY_SIDE, ONE_AFTER_THE_OTHER = Sample((1, (6, 6), 6)), Sample(((6,), 4, (6,), 5))


def say(model, cache, tiles):
    """A turn of text: tiles, a list with a row of 0 and 1 for each of its tokens; None gives no mask."""
    rows = 3 if tiles is None else len(tiles)
    past = int(cache.get_seq_length())
    mask = None
    if tiles is not None:
        mask = torch.tensor(tiles).view(1, rows, -1, 4)
        if not slices_mask_rows():  # there the model takes the new rows out itself
            mask = torch.cat([torch.zeros(1, past, *mask.shape[2:], dtype=mask.dtype), mask], dim=1)
    text = torch.arange(rows)[None] + 3
    with torch.no_grad():
        return model(
            input_ids=text,
            attention_mask=torch.ones(1, past + rows, dtype=torch.long),
            cross_attention_mask=mask,
            **{CACHE: cache},
            use_cache=True,
        ).logits


BOTH, FIRST, SECOND = [1] * 8, [1] * 4 + [0] * 4, [0] * 4 + [1] * 4


def test_a_turn_whose_end_reads_fewer_pictures_drops_the_others(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    before = {index: cache.layers[index].keys.clone() for index in cache.cross_layers}
    first = cache.kept_indices[0] < 20
    assert 0 < int(first.sum()) < len(first)
    say(model, cache, [BOTH, FIRST])
    assert (cache.kept_indices[0] < 20).all()
    for index, keys in before.items():
        assert torch.equal(cache.layers[index].keys[:], keys[:, :, first])


def test_a_turn_that_reads_as_much_leaves_what_is_held_where_it_is(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    before = [tensor.data_ptr() for index in cache.cross_layers for tensor in cache.layers[index].held_tensors()]
    say(model, cache, [SECOND, BOTH])
    after = [tensor.data_ptr() for index in cache.cross_layers for tensor in cache.layers[index].held_tensors()]
    assert after == before


def test_rows_read_what_their_mask_allows_of_what_is_held(model):
    """Two rows of one turn, and the second alone after the first has left nothing behind but its text."""
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    other = copy.deepcopy(cache)
    together = say(model, cache, [BOTH, FIRST])
    say(model, other, [BOTH])
    alone = say(model, other, [FIRST])
    # A single row is a decoding step, which reads what the last one could: so the second differs, the first does not.
    assert not torch.allclose(together[:, 1], alone[:, 0], atol=1e-3)


def test_what_is_gone_cannot_be_read_by_a_row_that_sees(model):
    _, cache = prefilled(model, [ONE_AFTER_THE_OTHER])
    assert (cache.kept_indices[0] >= 20).all()
    with pytest.raises(ValueError, match="has dropped them"):
        say(model, copy.deepcopy(cache), [BOTH, SECOND])
    say(model, cache, [[0] * 8, SECOND])  # a fully masked row says nothing


def test_a_mask_must_cover_every_picture_so_far(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    with pytest.raises(ValueError, match="covers 20 visual tokens, but the pictures of this conversation are 40"):
        say(model, cache, [[1] * 4, [1] * 4])
