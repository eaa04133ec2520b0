"""Kinds of adapters on the text model that `load_adapters` does not load: peft's own way of putting them on works as well."""

import peft
import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE
from trim_plugin.embedded import ask, load_small_model

ATTENTION = r".*language_model.*(q_proj|k_proj|v_proj)$"


def config(kind):
    if kind == "ia3":
        return peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[], init_ia3_weights=False)
    return peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False, use_dora=kind == "dora")


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_other_adapters_on_the_text_model(kind):
    plain, processor = load_small_model()
    inputs = ask(processor)

    def kept(model):
        cache = TrimmedCache(model, {"top_k_ratio": 0.2})
        with torch.no_grad():
            model(**inputs, **{CACHE: cache}, use_cache=True)
        return cache.kept_indices[0].tolist()

    before = kept(plain)
    torch.manual_seed(0)
    model = peft.get_peft_model(plain, config(kind)).eval()
    settings = {"max_new_tokens": 8, "do_sample": False}
    stock = model.generate(**inputs, **settings)
    exact = model.generate(**inputs, **settings, cache_implementation="trimmed", cache_config={"top_k_ratio": 1.0})
    assert torch.equal(stock, exact)
    assert kept(model) != before  # the rule asks the adapted projections
    with model.disable_adapter():
        assert kept(model) == before
