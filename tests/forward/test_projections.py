"""Queries and keys that are worked out beside a layer are those that the layer works out itself."""

from __future__ import annotations

import torch
from transformers.models.mllama import modeling_mllama

from trim_plugin.forward.finding import cross_layers
from trim_plugin.forward.projections import layer_keys, layer_queries

from ..random_models import Sample, random_inputs, random_model


def test_they_are_what_stocks_attention_is_given(monkeypatch):
    model = random_model(attention="eager")
    (layer, _), given = cross_layers(model.model.language_model), []
    original = modeling_mllama.eager_attention_forward

    def attend(module, query, key, *args, **kwargs):
        if module is layer.cross_attn:
            given.extend([query, key])
        return original(module, query, key, *args, **kwargs)

    def before(module, args, kwargs):
        states = kwargs["cross_attention_states"]
        given.extend(
            [layer_queries(module, args[0]), layer_keys(module, states.reshape(len(args[0]), -1, states.shape[-1]))]
        )

    monkeypatch.setattr(modeling_mllama, "eager_attention_forward", attend)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        model(**random_inputs(model, [Sample((1, (6,), 6)), Sample((2, (1,), 3))]))
    ours_queries, ours_keys, queries, keys = given
    torch.testing.assert_close(ours_queries, queries)
    torch.testing.assert_close(ours_keys, keys)
