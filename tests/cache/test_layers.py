"""A cross-attention layer: a store for every width class, in every format, growing or in buffers."""

import functools
import importlib.util
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trim_plugin.cache.blocks import Blocks
from trim_plugin.cache.kept import KeptTokens, take_tokens
from trim_plugin.cache.layers import CrossAttentionLayer, Plain
from trim_plugin.cache.regrouping import padded_columns, padded_join, regrouped
from trim_plugin.selection.select import Columns

FORMATS = (None, *(("int8", "nf4") if importlib.util.find_spec("bitsandbytes") is not None else ()))
HEADS, DIM, TILE = 2, 32, 4


def columns_of(keeps, width, sizes=None):
    """Columns of samples that keep these tokens, lists of lists."""
    batch = len(keeps)
    readable = torch.zeros(batch, width, dtype=torch.bool)
    for row, kept in zip(readable, keeps, strict=True):
        row[kept] = True
    index = torch.arange(width).expand(batch, -1)
    ones = torch.ones_like(index)
    return Columns(index, ones.bool(), ones if sizes is None else sizes, 0 * ones, readable, 0, TILE)


def record_of(keeps, width, bucket=0):
    columns = columns_of(keeps, width)
    return KeptTokens.of(
        columns,
        [len(kept) for kept in keeps],
        visible=torch.full((len(keeps),), width),
        readable_tiles=torch.ones(len(keeps), width // TILE, dtype=torch.bool),
        token_bytes=8,
        dtype=torch.float32,
        sized=False,
        bucket=bucket,
    )


def new_layer(format=None, static=False):
    return CrossAttentionLayer(None if format is None else functools.partial(Blocks.of, format=format), static)


def filled(keeps, width, format=None, static=False):
    """A layer that a prompt with pictures has left, its record, and the keys that were given."""
    keys = torch.randn(len(keeps), HEADS, width, DIM)
    layer = new_layer(format, static)
    layer.update(keys, 2 * keys)
    kept, picked = record_of(keeps, width, 8 if static else 0)
    layer.settle(kept, picked)
    return layer, kept, keys


def rounded(states, format):
    """What a format makes of states, token by token."""
    return states if format is None else Blocks.of(Plain(states, states), format).read()[0]


def read(layer, kept):
    """Every sample's keys and values, without padding."""
    keys, values = layer.keys[:], layer.values[:]
    return [(keys[row, :, :count], values[row, :, :count]) for row, count in enumerate(kept.counts())]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("static", [False, True])
def test_every_sample_keeps_its_own_tokens_whatever_class_it_is_in(format, static):
    keeps = [[0, 3], list(range(16)), [5], list(range(1, 16)), [1, 2]]
    layer, kept, keys = filled(keeps, 16, format, static)
    for row, (own_keys, own_values) in enumerate(read(layer, kept)):
        assert torch.equal(own_keys, rounded(keys, format)[row][:, keeps[row]])
        assert torch.equal(own_values, rounded(2 * keys, format)[row][:, keeps[row]])
    assert len(kept.classes) == (1 if static else 3)
    assert layer.get_seq_length() == 16


@pytest.mark.parametrize("format", FORMATS)
def test_a_later_picture_follows_and_nothing_is_quantized_twice(format):
    layer, kept, _ = filled([[0, 3], list(range(8))], 8, format)
    before = [layer.keys[0, :, :2].clone(), layer.keys[1].clone()]
    new = torch.randn(2, HEADS, 4, DIM)
    attended, _ = layer.update(new, 2 * new)
    assert torch.equal(attended[:, :, 8:], new)  # this forward reads the new ones as they are
    earlier = padded_columns(kept)
    both = columns_of([[0, 2], [1]], 4)
    both.index = both.index + 8
    columns = earlier.followed_by(both, torch.ones(2, 3, dtype=torch.bool))
    columns.readable[1, :4] = False
    after, picked = KeptTokens.of(
        columns,
        columns.readable.sum(1).tolist(),
        visible=kept.visible,
        readable_tiles=torch.ones(2, 3, dtype=torch.bool),
        token_bytes=8,
        dtype=torch.float32,
        sized=False,
        bucket=0,
    )
    layer.settle(after, picked)
    (first, _), (second, _) = read(layer, after)
    fresh = rounded(new, format)
    assert torch.equal(first, torch.cat([before[0], fresh[0][:, [0, 2]]], dim=1))
    assert torch.equal(second, torch.cat([before[1][:, 4:], fresh[1][:, [1]]], dim=1))
    assert [index.tolist() for index in after.per_sample("index")] == [[0, 3, 8, 10], [4, 5, 6, 7, 9]]


class Concatenated(TorchDispatchMode):
    """Counts tensors of keys or values that are put together along their tokens."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.cat.default and result.is_floating_point() and result.shape[-1] == DIM
        return result


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_later_picture_is_read_with_is_put_together_once(format):
    layer = filled([[0, 3], list(range(8))], 8, format)[0]
    new = torch.randn(2, HEADS, 4, DIM)
    after, picked = record_of([list(range(12))] * 2, 12)
    with Concatenated() as concatenated:
        attended, _ = layer.update(new, 2 * new)
        scored = layer.keys  # as choosing does in the first layer
        layer.settle(after, picked)
    assert concatenated.count == 2  # keys, values
    assert torch.equal(scored, attended)
    assert torch.equal(layer.keys[:, :, 8:], rounded(new, format))


moves = st.lists(st.tuples(st.sampled_from(["repeat", "select"]), st.integers(0, 10**6)), max_size=4)


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=9),
    moves,
    st.sampled_from(FORMATS),
    st.booleans(),
    st.integers(0, 99),
)
def test_samples_move_as_if_each_had_a_copy_of_its_own(counts, steps, format, static, seed):
    generator = torch.Generator().manual_seed(seed)
    keeps = [torch.randperm(16, generator=generator)[:count].sort().values.tolist() for count in counts]
    layer, kept, _ = filled(keeps, 16, format, static)
    copies = [(keys.clone(), values.clone()) for keys, values in read(layer, kept)]
    indices = list(keeps)
    for kind, number in steps:
        count = len(copies)
        if kind == "repeat":
            samples = [sample for sample in range(count) for _ in range(number % 3 + 1)]
        else:
            samples = torch.randint(count, (number % 5 + 1,), generator=generator).tolist()
        copies, indices = [copies[sample] for sample in samples], [indices[sample] for sample in samples]
        order = [kept.order[sample] for sample in samples]
        sources = list(dict.fromkeys(order))
        kept, recipe = regrouped(
            [kept], [(0, source) for source in sources], [sources.index(s) for s in order], 8 if static else 0
        )
        layer.regroup(kept, recipe, [layer])
    assert [index.tolist() for index in kept.per_sample("index")] == indices
    for (keys, values), (ours, our_values) in zip(copies, read(layer, kept), strict=True):
        assert torch.equal(ours, keys)
        assert torch.equal(our_values, values)
    # Held once, whatever reads it, and little of it padding.
    held = sum(store.shape[0] * store.shape[1] for store in layer.stores)
    if not static:
        distinct = {source: len(indices[kept.order.index(source)]) for source in range(kept.sources)}
        assert held >= sum(distinct.values())
        if len(kept.classes) < 6:
            assert held <= sum(distinct.values()) * 8 / 7


@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from(FORMATS))
def test_batches_are_joined(batches, format):
    """Also those of a static cache, whose parts grow."""
    for static in (False, True):
        parts = [filled([list(range(count)) for count in counts], 12, format) for counts in batches]
        expected = [pair for layer, kept, _ in parts for pair in read(layer, kept)]
        sources = [(number, source) for number, (_, kept, _) in enumerate(parts) for source in range(kept.sources)]
        kept, recipe = regrouped([kept for _, kept, _ in parts], sources, range(len(sources)), 8 if static else 0)
        whole = new_layer(format, static)
        whole.regroup(kept, recipe, [layer for layer, _, _ in parts])
        for (keys, values), (ours, our_values) in zip(expected, read(whole, kept), strict=True):
            assert torch.equal(ours, keys)
            assert torch.equal(our_values, values)


def test_at_most_six_classes_and_an_eighth_of_padding_where_that_suffices():
    for counts in ([100, 90, 88], [16, 15, 8, 7, 4, 2, 1, 1], list(range(1, 60))):
        kept, _ = record_of([list(range(count)) for count in counts], 100)
        assert len(kept.classes) <= 6
        held = sum(own.width * len(own.sources) for own in kept.classes)
        if len(kept.classes) < 6:
            assert all(min(own.counts) >= own.width * 7 / 8 for own in kept.classes)
        assert held <= len(counts) * max(counts)
        assert sorted(itertools.chain(*(own.sources for own in kept.classes))) == list(range(len(counts)))


def test_settled_keys_lie_head_by_head():
    layer = CrossAttentionLayer()
    projected = torch.randn(1, 8, HEADS, DIM).transpose(1, 2)  # token by token, as a projection returns them
    layer.update(projected, projected)
    assert not layer.keys.is_contiguous()
    layer.settle(*record_of([list(range(8))], 8))
    assert layer.keys.is_contiguous()
    assert layer.values.is_contiguous()
    assert torch.equal(layer.keys[:], projected)


def test_what_is_held_does_not_hold_on_to_what_is_not():
    """A view of a few rows would keep the whole tensor alive."""
    layer, _, _ = filled([[0], list(range(8)), [1]], 8)
    for tensor in layer.held_tensors():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_taking_text_back_leaves_the_picture():
    layer, _, keys = filled([list(range(8))], 8)
    layer.crop(-3)
    layer.crop(1)
    assert torch.equal(layer.keys[:], keys)


def test_buffers_outlive_a_reset_and_are_filled_again_if_they_fit():
    layer, _, _ = filled([[0, 1, 2]], 8, static=True)
    first = [tensor.data_ptr() for tensor in layer.held_tensors()]
    layer.reset()
    assert layer.keys is None
    keys = torch.randn(1, HEADS, 8, DIM)
    layer.update(keys, keys)
    layer.settle(*record_of([[4, 5]], 8, bucket=8))
    assert [tensor.data_ptr() for tensor in layer.held_tensors()] == first
    assert torch.equal(layer.keys[:, :, :2], keys[:, :, 4:6])


@pytest.mark.parametrize("shape", [(1, 6, 3), (2, 6, 3), (1, 2, 6, 3), (3, 2, 6, 3)])
def test_tokens_are_picked_along_the_second_last_dimension(shape):
    tensor, positions = torch.randn(shape), torch.randint(6, (shape[0], 4))
    expected = torch.stack([sample[..., picked, :] for sample, picked in zip(tensor, positions, strict=True)])
    assert torch.equal(take_tokens(tensor, positions), expected)


def test_a_single_tensor_of_the_right_width_is_joined_without_a_copy():
    tensor = torch.randn(2, 3, 4)
    assert padded_join([tensor], 3, dim=1) is tensor
