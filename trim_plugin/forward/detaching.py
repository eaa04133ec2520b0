"""Takes every hook of trim_plugin off a model."""

from __future__ import annotations

import torch
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from trim_plugin.cache.reading import forget
from trim_plugin.forward.finding import attaching, take_off
from trim_plugin.forward.hooks import after_layer, after_model, before_layer, before_model, open_text_turn, open_turn
from trim_plugin.forward.tower_merging import TOWER_HOOKS


def detach(model: torch.nn.Module) -> None:
    """Remove every hook that trim_plugin put on a model. Other hooks stay; a model without hooks is left as it is.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> from trim_plugin.forward.hooks import attach
        >>> model, _ = load_small_model()
        >>> _ = attach(model)
        >>> detach(model)
        >>> any(layer._forward_hooks for layer in model.model.language_model.layers)
        False
    """
    with attaching:
        for module in model.modules():
            if isinstance(module, MllamaTextCrossAttention):
                forget(module)
            take_off(
                module, before_layer, after_layer, before_model, after_model, open_turn, open_text_turn, *TOWER_HOOKS
            )
