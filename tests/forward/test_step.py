import pytest
import torch

from trim_plugin.forward.step import Reading

from ..random_models import Sample, prefilled

LOW = torch.finfo(torch.float32).min
#: Two pictures that the end of the prompt reads both, 20 visual tokens each; and one that it does not read any more.
SIDE_BY_SIDE, ONE_AFTER_THE_OTHER = Sample((1, (6, 6), 6)), Sample(((6,), 4, (6,), 5))


def reading(model, cache, mask, open_rows=None, rows=2, padding=None):
    hidden_states = torch.zeros(1, rows, model.config.text_config.hidden_size)
    return Reading(cache, cache.tokens, mask, open_rows, padding, hidden_states)


def finished(model, cache, step):
    """Run a step over every cross-attention layer, as the hooks do."""
    for number, index in enumerate(cache.cross_layers):
        assert step.before(number == 0)[0] is None
        step.after(model.model.language_model.layers[index].cross_attn, torch.zeros(1, 2, 32))
    step.finish()


def test_without_a_mask_every_row_reads_everything_with_log_sizes(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    mask = reading(model, cache, None, rows=3).before(True)[1]
    assert mask.shape[2] == 3
    assert torch.equal(mask[0, 0], cache.kept_sizes[0].float().log().expand(3, -1))


def test_rows_read_what_their_mask_allows_of_what_is_held(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE], merge=False)
    kept = cache.kept_indices[0]
    mask = torch.zeros(1, 1, 2, 40)
    mask[0, 0, 0, 20:] = LOW
    got = reading(model, cache, mask).before(False)[1]
    assert (got[0, 0, 0] == 0).tolist() == (kept < 20).tolist()
    assert (got[0, 0, 1] == 0).all()


def test_a_turn_whose_end_reads_fewer_pictures_drops_the_others(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    before = {index: cache.layers[index].keys for index in cache.cross_layers}
    first = cache.kept_indices[0] < 20
    assert 0 < int(first.sum()) < len(first)
    mask = torch.zeros(1, 1, 2, 40)
    mask[0, 0, 1, 20:] = LOW
    finished(model, cache, reading(model, cache, mask))
    assert (cache.kept_indices[0] < 20).all()
    for index, keys in before.items():
        assert torch.equal(cache.layers[index].keys, keys[:, :, first])


def test_a_turn_that_reads_as_much_leaves_the_cache_alone(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    tokens, keys = cache.tokens, cache.layers[cache.cross_layers[0]].keys
    finished(model, cache, reading(model, cache, torch.zeros(1, 1, 2, 40)))
    assert cache.tokens is tokens
    assert cache.layers[cache.cross_layers[0]].keys is keys


def test_what_is_gone_cannot_be_read_by_a_row_that_sees(model):
    _, cache = prefilled(model, [ONE_AFTER_THE_OTHER])
    assert (cache.kept_indices[0] >= 20).all()
    mask = torch.zeros(1, 1, 2, 40)
    mask[0, 0, 1, :20] = LOW
    with pytest.raises(ValueError, match="has dropped them"):
        reading(model, cache, mask)
    blind_first = torch.tensor([[[[0.0], [1.0]]]])
    reading(model, cache, mask, blind_first)  # a blind row's mask is all zeros and says nothing


def test_a_mask_must_cover_every_picture_so_far(model):
    _, cache = prefilled(model, [SIDE_BY_SIDE])
    with pytest.raises(ValueError, match="covers 20 visual tokens, but the pictures of this conversation are 40"):
        reading(model, cache, torch.zeros(1, 1, 2, 20))
