import dataclasses

import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.cache.tokens import CachedTokens, Storage
from trim_plugin.compat import cache_of

from ..random_models import PAIR, Sample, generate, largest_difference, random_inputs, random_model, trimmed


def test_decoding_passes_no_mask_where_none_is_needed():
    model, masks = random_model(heads=4, kv_heads=4), []
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    cache = TrimmedCache(model, {"top_k_ratio": 0.2, "merge": False})
    model.model.language_model.layers[3].cross_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    generate(model, inputs, 4, cache=cache)
    assert masks[0] is not None
    assert masks[1:] == [None] * 3


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_padding_between_samples_is_masked_while_decoding(kv_heads):
    model, masks = random_model(heads=4, kv_heads=kv_heads), []
    inputs = random_inputs(model, PAIR)
    cache = TrimmedCache(model, {"top_k_ratio": 0.2})
    model.model.language_model.layers[3].cross_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    generate(model, inputs, 3, cache=cache)
    kept = [len(indices) for indices in cache.kept_indices]
    assert kept[0] != kept[1]
    assert ((masks[-1][:, 0, 0] >= 0).sum(dim=1)).tolist() == kept


def test_shared_heads_get_an_open_mask_on_a_cpu():
    """And only there: see `tokens.Storage.wants_mask`."""
    shared, plain = (random_model(heads=4, kv_heads=heads) for heads in (2, 4))
    for model, masked in ((shared, True), (plain, False)):
        inputs = random_inputs(model, [Sample((1, (6,), 6))])
        tokens = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2, "merge": False}, 2)).tokens
        assert (tokens.decode_mask is not None) is masked
        assert not masked or bool((tokens.decode_mask == 0).all())
    storage = Storage(8, torch.float32, shared_heads=True)
    assert not storage.wants_mask(torch.device("cuda"))
    assert dataclasses.replace(storage, bucket=8).wants_mask(torch.device("cuda"))


def test_shared_heads_without_a_mask_as_on_a_gpu_equal_stock(monkeypatch):
    monkeypatch.setattr(Storage, "wants_mask", lambda self, device: self.bucket > 1)
    model = random_model(seed=3, heads=4, kv_heads=2)
    for samples in ([Sample((1, (6,), 6))], PAIR):
        inputs = random_inputs(model, samples)
        ours, stock = trimmed(model, inputs, {"top_k_ratio": 1.0}), generate(model, inputs)
        assert (cache_of(ours).tokens.decode_mask is None) is (len(samples) == 1)
        assert torch.equal(ours.sequences, stock.sequences)
        assert largest_difference(ours, stock) <= 1e-5


def two_samples() -> CachedTokens:
    """Of 4 tokens: the first sample holds 0, 2, 3, the second 1, 3, with sizes 1 … 3."""
    chosen = torch.tensor([[True, False, True, True], [False, True, False, True]])
    index, sizes = torch.arange(4).expand(2, -1), torch.tensor([[1, 1, 2, 3], [1, 2, 1, 1]])
    reachable = torch.ones(2, 4, dtype=torch.bool)
    tokens, _ = CachedTokens.choose(index, sizes, chosen, torch.tensor([4, 4]), reachable, Storage(8, torch.float32))
    return tokens


def held(tokens: CachedTokens) -> list[dict[int, int]]:
    """Of every sample: visual token to size."""
    return [
        dict(zip(index[valid].tolist(), sizes[valid].tolist(), strict=True))
        for index, sizes, valid in zip(tokens.index, tokens.sizes, tokens.valid, strict=True)
    ]


def test_what_is_chosen_is_held_with_its_size():
    tokens = two_samples()
    assert held(tokens) == [{0: 1, 2: 2, 3: 3}, {1: 2, 3: 1}]
    assert tokens.total == 4
    assert tokens.decode_mask is not None
    assert torch.equal(tokens.decode_mask[0, 0, 0], torch.tensor([1.0, 2.0, 3.0]).log())
    assert tokens.decode_mask[1, 0, 0, 2] == torch.finfo(torch.float32).min


def test_narrowing_drops_what_is_out_of_reach_and_says_which_positions_stay():
    tokens = two_samples()
    reachable = torch.tensor([[False, True, True, True], [True, True, True, False]])
    narrowed, positions = tokens.narrowed_to(reachable)
    assert held(narrowed) == [{2: 2, 3: 3}, {1: 2}]
    assert torch.equal(narrowed.index[narrowed.valid], tokens.index.gather(1, positions)[narrowed.valid])
    assert torch.equal(narrowed.reachable, reachable)
    assert held(tokens) == [{0: 1, 2: 2, 3: 3}, {1: 2, 3: 1}]  # the record itself does not change


@pytest.mark.parametrize("samples", [torch.tensor([1, 0, 1]), torch.tensor([False, True])])
def test_every_part_of_the_record_moves_with_its_sample(samples):
    tokens, order = two_samples(), [1, 0, 1] if samples.dtype == torch.long else [1]
    moved = tokens.of_samples(samples)
    for field in dataclasses.fields(CachedTokens):
        before, after = getattr(tokens, field.name), getattr(moved, field.name)
        assert torch.equal(after, before[order]) if isinstance(before, torch.Tensor) else after is before


def test_several_rows_get_the_held_columns_with_log_sizes():
    tokens, low = two_samples(), torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 2, 4)
    mask[0, 0, 1, 3] = low
    reading = tokens.reading_mask(mask)
    assert torch.equal(reading[0, 0, 0], torch.tensor([1.0, 2.0, 3.0]).log())
    assert reading[0, 0, 1, 2] == low
    assert torch.equal(tokens.open_reading_mask(2)[0, 0, 1], torch.tensor([1.0, 2.0, 3.0]).log())


def test_widths_are_multiples_of_the_bucket():
    chosen = torch.tensor([[True, True, True, False]])
    ones = torch.ones(1, 4, dtype=torch.long)
    tokens, positions = CachedTokens.choose(
        torch.arange(4)[None], ones, chosen, torch.tensor([4]), chosen, Storage(8, torch.float32, bucket=2)
    )
    assert positions.shape == tokens.valid.shape == (1, 4)
    assert held(tokens) == [{0: 1, 1: 1, 2: 1}]
