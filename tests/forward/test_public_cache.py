import pytest
import torch

from trim_plugin import TopKPerHead, TrimmedCache
from trim_plugin.cache.report import format_bytes
from trim_plugin.compat import CACHE, cache_of

from ..random_models import PAIR, Sample, generate, random_inputs, random_model, trimmed


def test_by_hand_equals_by_name(model):
    inputs = random_inputs(model, PAIR)
    by_name = trimmed(model, inputs, {"top_k_ratio": 0.2})
    by_hand = generate(model, inputs, cache=TrimmedCache(model, {"top_k_ratio": 0.2}))
    assert torch.equal(by_name.sequences, by_hand.sequences)
    assert isinstance(cache_of(by_hand), TrimmedCache)


def test_a_cache_for_another_model_is_refused(model):
    other = random_model(seed=1)
    inputs = random_inputs(model, PAIR)
    with pytest.raises(ValueError, match="made for another model"):
        generate(other, inputs, cache=TrimmedCache(model))
    with pytest.raises(RuntimeError, match="made for another model"), torch.no_grad():
        other(**inputs, **{CACHE: TrimmedCache(model)}, use_cache=True)
    TrimmedCache(other)  # hooks on it now
    with pytest.raises(ValueError, match="made for another model"), torch.no_grad():
        other(**inputs, **{CACHE: TrimmedCache(model)}, use_cache=True)


def test_models_without_cross_attention_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match=r"needs an Mllama model.*LlamaForCausalLM has none"):
        TrimmedCache(llama)
    with pytest.raises(ValueError, match="needs an Mllama model"):
        llama.generate(torch.tensor([[1, 2]]), max_new_tokens=1, cache_implementation="trimmed")


@pytest.mark.parametrize("config", [{"top_k_ratio": 0.2}, {"top_k_ratio": 1.0, "static": True, "max_cache_len": 64}])
def test_its_repr_says_what_it_holds(model, config):
    cache = TrimmedCache(model, config)
    settings = ", ".join(f"{name}={value}" for name, value in config.items())
    assert repr(cache) == f"TrimmedCache(new; {settings})"
    inputs = random_inputs(model, PAIR)
    generate(model, inputs, 2, cache=cache)
    report = cache.report()
    text = inputs["input_ids"].shape[1] + 1  # the last token that was generated has not been read
    kept, visible = sum(report.kept_tokens), sum(report.visible_tokens)
    size = format_bytes(report.cross_kv_bytes + report.self_kv_bytes)
    said = f"{text} text tokens; {kept} of {visible} visible visual tokens kept; {size}; {settings})"
    assert repr(cache) == f"TrimmedCache(2 samples: {said}"
    if "static" not in config:
        cache.batch_select_indices(torch.tensor([1]))
        assert repr(cache).startswith(f"TrimmedCache(1 sample: {text} text tokens; {report.kept_tokens[1]} of")
    cache.reset()
    assert repr(cache) == f"TrimmedCache(new; {settings})"


def test_its_repr_without_a_picture(model):
    inputs = random_inputs(model, [Sample((4,))])
    output = trimmed(model, inputs, {}, 1)
    assert repr(cache_of(output)).startswith("TrimmedCache(1 sample: 4 text tokens; no visual tokens; ")


def test_a_notebook_shows_what_it_holds(model):
    class Marked(TopKPerHead):
        def __repr__(self):
            return "<b>mine</b>"

    cache = TrimmedCache(model, {"processors": [Marked(0.2)]})
    assert "<table>" not in cache._repr_html_()
    generate(model, random_inputs(model, PAIR), 2, cache=cache)
    html = cache._repr_html_()
    assert cache.report()._repr_html_() in html
    assert "<b>" not in html
    assert "&lt;b&gt;mine&lt;/b&gt;" in html
