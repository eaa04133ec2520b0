import dataclasses

import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.cache.tokens import Storage

from ..random_models import PAIR, Sample, generate, largest_difference, random_inputs, random_model, trimmed


def test_decoding_passes_no_mask_where_none_is_needed():
    model, masks = random_model(heads=4, kv_heads=4), []
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    cache = TrimmedCache(model, {"top_k_ratio": 0.2, "merge": False})
    model.model.language_model.layers[3].cross_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    generate(model, inputs, 4, past_key_values=cache)
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
    generate(model, inputs, 3, past_key_values=cache)
    kept = [len(indices) for indices in cache.kept_indices]
    assert kept[0] != kept[1]
    assert ((masks[-1][:, 0, 0] >= 0).sum(dim=1)).tolist() == kept


def test_shared_heads_get_an_open_mask_on_a_cpu():
    """And only there: see `tokens.Storage.wants_mask`."""
    shared, plain = (random_model(heads=4, kv_heads=heads) for heads in (2, 4))
    for model, masked in ((shared, True), (plain, False)):
        inputs = random_inputs(model, [Sample((1, (6,), 6))])
        tokens = trimmed(model, inputs, {"top_k_ratio": 0.2, "merge": False}, 2).past_key_values.tokens
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
        assert (ours.past_key_values.tokens.decode_mask is None) is (len(samples) == 1)
        assert torch.equal(ours.sequences, stock.sequences)
        assert largest_difference(ours, stock) <= 1e-5
