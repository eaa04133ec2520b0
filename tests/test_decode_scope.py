import copy

import pytest
import torch

from trim_plugin import TopKPerHead, TrimConfig

from .random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed

DECODE = {"top_k_ratio": 0.1, "scope": "decode"}
PAIR = [Sample((2, (6,), 5)), Sample((1, (2,), 7))]
BATCHES = [
    [Sample((2, (6,), 5))],
    PAIR,
    [Sample((1, (6,), 4, (2,), 5)), Sample(((3, 1), 3))],
    [Sample((6,)), Sample((1, (6,), 4))],
]


def chosen_by_all_layers(model, inputs, ratio):
    """The rule, restated from eager attention maps: every head of every cross-attention layer keeps its k best. One group."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    maps = []
    for module in eager.modules():
        if hasattr(module, "cross_attn"):
            module.cross_attn.register_forward_hook(lambda _module, _args, output: maps.append(output[1]))
    with torch.no_grad():
        eager(**inputs, use_cache=False)
    tiles = inputs["cross_attention_mask"][0].flatten(1)
    voters = tiles.any(dim=1)
    visible = tiles[-1].repeat_interleave(maps[0].shape[-1] // tiles.shape[1]).bool()
    k = max(1, -(-int(visible.sum() * ratio * 1000) // 1000))
    kept = set()
    for attention in maps:
        score = attention[0][:, voters].mean(dim=1).masked_fill(~visible, -1.0)
        kept.update(score.topk(k, dim=-1).indices.flatten().tolist())
    return sorted(kept)


@pytest.mark.parametrize("samples", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_first_token_is_stocks(samples, attention):
    model = random_model(seed=4, attention=attention)
    inputs = random_inputs(model, samples)
    stock, ours = generate(model, inputs, 4), trimmed(model, inputs, DECODE, 4)
    assert torch.allclose(stock.logits[0], ours.logits[0], atol=1e-5)
    report = ours.past_key_values.report()
    assert sum(report.kept_tokens) < sum(report.total_tokens)
    assert largest_difference(stock, ours) > 1e-3, "nothing was trimmed: the comparison above says little"


@pytest.mark.parametrize("layers", [(4, (1,)), (6, (1, 2, 5))])
def test_kept_is_the_union_of_all_layers(layers):
    model = random_model(seed=7, layers=layers[0], cross_layers=layers[1], image_size=16)
    inputs = random_inputs(model, [Sample((2, (6,), 5))])
    cache = trimmed(model, inputs, DECODE, 2).past_key_values
    assert cache.kept_indices[0].tolist() == chosen_by_all_layers(model, inputs, 0.1)


def test_decoding_reads_the_kept_tokens_only():
    model = random_model(seed=4)
    inputs = random_inputs(model, PAIR)
    ours = trimmed(model, inputs, DECODE, 4)
    cache = ours.past_key_values
    stock = generate(model, inputs, 4, output_logits=True).past_key_values
    for index in cache.cross_layers:
        for sample, kept in enumerate(cache.kept_indices):
            held = cache.layers[index].keys[sample][:, : len(kept)]
            assert torch.allclose(held, stock.layers[index].keys[sample][:, kept], atol=1e-6)


def test_processors_see_the_heads_of_all_layers():
    shapes = []

    def look(scores, visible):
        shapes.append(tuple(scores.shape))
        return TopKPerHead(0.2)(scores, visible)

    model = random_model(heads=4, cross_layers=(1, 3))
    inputs = random_inputs(model, [Sample((1, (2,), 4))])
    trimmed(model, inputs, {"processors": [look], "scope": "decode"}, 2)
    assert shapes == [(1, 8, 20)]


def test_ratio_one_is_exact_in_both_scopes():
    model = random_model(seed=2)
    inputs = random_inputs(model, PAIR)
    ours = trimmed(model, inputs, {"top_k_ratio": 1.0, "scope": "decode"})
    assert largest_difference(generate(model, inputs), ours) <= 1e-5


def test_beams_and_text_only_prompts():
    model = random_model(seed=4)
    assert trimmed(model, random_inputs(model, PAIR), DECODE, 4, num_beams=3).sequences.shape[0] == 2
    text = random_inputs(model, [Sample((7,))])
    assert torch.equal(generate(model, text).sequences, trimmed(model, text, DECODE).sequences)


@pytest.mark.parametrize("more", [{"kv_quantization": "int8"}, {"static": True, "static_bucket": 8}])
def test_goes_with_quantized_and_static_caches(more):
    model = random_model(seed=4, image_size=16)
    inputs = random_inputs(model, PAIR)
    plain, ours = trimmed(model, inputs, DECODE, 5), trimmed(model, inputs, DECODE | more, 5, disable_compile=True)
    kept = [[tokens.tolist() for tokens in output.past_key_values.kept_indices] for output in (plain, ours)]
    assert kept[0] == kept[1]
    assert largest_difference(plain, ours) < (0.5 if "kv_quantization" in more else 1e-5)


def test_unknown_scopes_are_refused():
    with pytest.raises(ValueError, match="scope must be one of 'prefill', 'decode', got 'all'"):
        TrimConfig(scope="all")
