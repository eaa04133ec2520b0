import pytest
import torch

from trim_plugin import TrimmedCache

from ..random_models import PAIR, generate, random_inputs, random_model, trimmed


def test_by_hand_equals_by_name(model):
    inputs = random_inputs(model, PAIR)
    by_name = trimmed(model, inputs, {"top_k_ratio": 0.2})
    by_hand = generate(model, inputs, past_key_values=TrimmedCache(model, {"top_k_ratio": 0.2}))
    assert torch.equal(by_name.sequences, by_hand.sequences)
    assert isinstance(by_hand.past_key_values, TrimmedCache)


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
