"""The way back: a model without any hook of trim_plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from trim_plugin.cache.reading import forget
from trim_plugin.forward.finding import attaching, attention_of, whole_models
from trim_plugin.forward.hooks import (
    after_layer,
    after_model,
    before_layer,
    before_model,
    open_text_turn,
    open_turn,
)
from trim_plugin.forward.tower_merging import tower_hooks


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
        _detach(model)


def _detach(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MllamaCrossAttentionDecoderLayer):
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, before_layer)
            _remove(module._forward_hooks, module._forward_hooks_with_kwargs, after_layer)
            forget(attention_of(module))
    for module in whole_models(model):
        for hook in (before_model, open_turn, open_text_turn):
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook)
        _remove(module._forward_hooks, module._forward_hooks_with_kwargs, after_model)
    for module, hooks in tower_hooks(model):
        for hook in hooks:
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook)
            _remove(module._forward_hooks, module._forward_hooks_with_kwargs, hook)


def _remove(hooks: dict[int, Callable[..., Any]], with_kwargs: dict[int, bool], own: Callable[..., Any]) -> None:
    # torch offers removal only by the handle; a deep-copied model has the hooks but nobody holds its handles.
    for key in [key for key, hook in hooks.items() if hook is own]:
        del hooks[key]
        with_kwargs.pop(key, None)
