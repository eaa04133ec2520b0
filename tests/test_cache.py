import copy
import dataclasses
import gc
import weakref

import pytest
import torch

from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.cache.tokens import Storage

from .random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from .reference_rule import kept_by_rule


def prefilled(model, samples, ratio=0.2):
    inputs = random_inputs(model, samples)
    cache = TrimmedCache(model, TrimConfig(top_k_ratio=ratio))
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return inputs, cache


PAIR = [Sample((1, (6,), 6)), Sample((2, (1,), 3))]


def test_by_hand_equals_by_name(model):
    inputs = random_inputs(model, PAIR)
    by_name = trimmed(model, inputs, {"top_k_ratio": 0.2})
    by_hand = generate(model, inputs, past_key_values=TrimmedCache(model, {"top_k_ratio": 0.2}))
    assert torch.equal(by_name.sequences, by_hand.sequences)
    assert isinstance(by_hand.past_key_values, TrimmedCache)


def test_all_cross_layers_hold_the_kept_tokens_and_project_no_more(model):
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    kept = kept_by_rule(model, inputs, 0.1)[0]
    projected: dict[int, list[int]] = {1: [], 3: []}
    for index, counts in projected.items():
        for name in ("k_proj", "v_proj"):
            module = getattr(model.model.language_model.layers[index].cross_attn, name)
            module.register_forward_hook(
                lambda _module, args, _output, counts=counts: counts.append(args[0].shape[:-1].numel())
            )
    cache = trimmed(model, inputs, {"top_k_ratio": 0.1}, 4).past_key_values
    assert cache.kept_indices[0].tolist() == kept
    assert [cache.layers[index].keys.shape[2] for index in projected] == [len(kept)] * 2
    assert [cache.layers[index].values.shape[2] for index in projected] == [len(kept)] * 2
    assert projected == {1: [20, 20], 3: [len(kept)] * 2}
    assert len(kept) < 20


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
        model(**random_inputs(model, PAIR), past_key_values=cache, use_cache=True)
    assert pointers[0] != pointers[1] == pointers[2]
    gc.collect()
    assert cache.step is None
    assert all(state() is None for state in given)


def test_report_counts_tensors(model):
    _, cache = prefilled(model, PAIR)
    report = cache.report()
    held = sum(cache.layers[index].keys.nbytes + cache.layers[index].values.nbytes for index in (1, 3))
    assert report.cross_kv_bytes == held
    assert report.total_tokens == [20, 20]
    assert report.visible_tokens == [20, 5]
    assert report.kept_tokens == [len(kept) for kept in cache.kept_indices]
    stock = model(**random_inputs(model, PAIR), use_cache=True).past_key_values
    assert report.stock_cross_kv_bytes == sum(
        stock.layers[index].keys.nbytes + stock.layers[index].values.nbytes for index in (1, 3)
    )
    assert report.self_kv_bytes == sum(
        stock.layers[index].keys.nbytes + stock.layers[index].values.nbytes for index in (0, 2, 4)
    )
    assert "of stock" in str(report)


def test_text_only(model):
    inputs = random_inputs(model, [Sample((6,)), Sample((3,))])
    ours = trimmed(model, inputs, {"top_k_ratio": 0.1})
    assert torch.equal(ours.sequences, generate(model, inputs).sequences)
    cache = ours.past_key_values
    assert [kept.numel() for kept in cache.kept_indices] == [0, 0]
    report = cache.report()
    assert (report.total_tokens, report.visible_tokens, report.kept_tokens) == ([0, 0], [0, 0], [0, 0])
    assert (report.cross_kv_bytes, report.stock_cross_kv_bytes) == (0, 0)
    assert report.self_kv_bytes > 0
    assert "no visual tokens" in str(report)


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
        open_part = moved.tokens.decode_mask[:, 0, 0].masked_fill(~moved.tokens.valid, -torch.inf)
        expected = moved.tokens.sizes.float().log().masked_fill(~moved.tokens.valid, -torch.inf)
        assert torch.equal(open_part, expected)


def test_exact_mode_lays_keys_and_values_out_as_decoding_reads_them(model):
    _, cache = prefilled(model, [Sample((1, (6,), 6))], 1.0)
    layers = [cache.layers[index] for index in cache.cross_layers]
    assert all(layer.keys.is_contiguous() and layer.values.is_contiguous() for layer in layers)


def test_reset_makes_it_as_new(model):
    inputs, cache = prefilled(model, PAIR)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = generate(model, inputs, past_key_values=cache)
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


def test_a_cache_for_another_model_is_refused(model):
    other = random_model(seed=1)
    inputs = random_inputs(model, PAIR)
    with pytest.raises(ValueError, match="made for another model"):
        generate(other, inputs, past_key_values=TrimmedCache(model))
    with pytest.raises(RuntimeError, match="made for another model"), torch.no_grad():
        other(**inputs, past_key_values=TrimmedCache(model), use_cache=True)
    TrimmedCache(other)  # hooks on it now
    with pytest.raises(ValueError, match="made for another model"), torch.no_grad():
        other(**inputs, past_key_values=TrimmedCache(model), use_cache=True)


def test_models_without_cross_attention_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match=r"needs an Mllama model.*LlamaForCausalLM has none"):
        TrimmedCache(llama)
    with pytest.raises(ValueError, match="needs an Mllama model"):
        llama.generate(torch.tensor([[1, 2]]), max_new_tokens=1, cache_implementation="trimmed")


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
