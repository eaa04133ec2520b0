"""Finds the parts of a model that carry hooks, looks inside wrappers for them, and puts hooks on them.

Others put decoder layers into wrappers (`checkpoint_wrapper`, `torch.compile`, FSDP), remove some and change their order. So an
entry of `layers` is what lies inside it, and a layer's place in a cache is its attention's `layer_idx`, as for transformers
itself. Hooks go on the layer inside: there the wrapper has done its work, and its weights are whole. peft's `modules_to_save`
puts several copies of a module into one wrapper, of which one runs: each of them gets hooks, and what is read of a module is
read through the wrapper, which hands on the attributes of the one that runs.

Also says which models, as they are now, cannot use a trimmed cache (`check_...`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaModel,
    MllamaTextCrossAttention,
    MllamaTextModel,
)

from trim_plugin.compat import checkpointing_keeps_caches

#: Held by whoever puts hooks on or takes them off: two threads would each find none, and put on two.
attaching = threading.RLock()

#: What marks the function that a hook is after pickling.
_LEFT_BEHIND = "a hook of trim_plugin, pickled"


class Hook(functools.partial[Any]):
    """A hook of trim_plugin. It does what the function does that it was made of; a pickle of it is a function that does nothing.

    So a model that was saved whole (`torch.save(model)`) with hooks on it can be loaded where trim_plugin is not installed. A
    `partial`, so that a call costs no frame of Python: hooks run in every layer of every step.

    Example:
        >>> import pickle
        >>> @Hook
        ... def forget(module, args, output):
        ...     return None
        >>> pickle.loads(pickle.dumps(forget))(None, (), None) is None
        True
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self  # a copy of a model in this program has the hooks that the model has

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(_LEFT_BEHIND), "__exit__")  # takes any arguments, returns None


def put_on(module: Any, before: Hook, after: Hook | None = None) -> None:
    """Register forward hooks, which take keyword arguments, on a module, unless it has them."""
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        if after is not None:
            module.register_forward_hook(after, with_kwargs=True)


def take_off(module: Any, *hooks: Hook) -> None:
    """Remove forward hooks from a module, and what a pickle has made of any."""
    # torch offers removal only by the handle; a deep-copied model has the hooks but nobody holds its handles.
    for registered, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in registered.items() if hook in hooks or _is_left_behind(hook)]:
            del registered[key]
            with_kwargs.pop(key, None)


def _is_left_behind(hook: Any) -> bool:
    context = getattr(hook, "__self__", None)
    return isinstance(context, contextlib.nullcontext) and context.enter_result == _LEFT_BEHIND


class Owner:
    """The model that a cache was made for, held weakly. A cache that was read from a file has none until it is bound to one."""

    def __init__(self) -> None:
        self.bound = False
        self._model: Any = None
        #: Returns its `MllamaTextModel`; None if that is gone. Hooks ask for it at every forward.
        self.text_model: Callable[[], Any] = lambda: None

    def bind(self, model: torch.nn.Module, text_model: torch.nn.Module) -> None:
        """Be this model from now on."""
        self._model, self.text_model, self.bound = weakref.ref(model), weakref.ref(text_model), True

    @property
    def model(self) -> Any:
        """The model, or its wrapper, as it was given; None if there is none, or none any more."""
        return self._model and self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        copied = Owner()
        copied.bound, copied._model, copied.text_model = self.bound, self._model, self.text_model
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, ()


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a model that a trimmed cache has to do with, out of their wrappers.

    Args:
        text_model: the `MllamaTextModel`.
        around: it, and the model of tower and text around it: what carries hooks beside the layers.
        cross: the cross-attention decoder layers in the order in which they run, copies among them.
        attentions: their attentions, copies among them.
        cross_places: where in a cache the cross-attention layers have their places, in the order in which they run.
        self_places: the same of the self-attention layers.
    """

    text_model: Any
    around: list[Any]
    cross: list[Any]
    attentions: list[Any]
    cross_places: list[int]
    self_places: list[int]


def find_text_model(model: torch.nn.Module) -> Any:
    """The `MllamaTextModel` in a model or in a wrapper around one.

    Raises:
        ValueError: there is none, or it has no cross-attention layer or no self-attention layer.
    """
    for module in model.modules():
        if isinstance(module, MllamaTextModel) and _crosses(module):
            return module
    raise ValueError(
        f"The trimmed cache needs an Mllama model (Llama-3.2-Vision) with cross-attention layers, but {type(model).__name__} "
        "has none. Use another cache_implementation for it."
    )


def find_model(model: torch.nn.Module) -> Any:
    """The `MllamaModel`, vision tower and text model together, in a model or in a wrapper around one.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, MllamaModel):
            return module
    raise ValueError(
        f"Encoded pictures need an Mllama model with a vision tower (Llama-3.2-Vision), but {type(model).__name__} has none."
    )


def has_cross_attention(model: torch.nn.Module) -> bool:
    """Whether a model, or what it wraps, can have a `TrimmedCache`."""
    return any(isinstance(module, MllamaTextModel) and _crosses(module) for module in model.modules())


def decoder_layers(text_model: Any) -> list[Any]:
    """The decoder layers of an `MllamaTextModel` in the order in which they run, out of their wrappers, copies among them.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> text_model = load_small_model()[0].model.language_model
        >>> text_model.layers[0] = torch.nn.Sequential(text_model.layers[0])
        >>> decoder_layers(text_model)[0] is text_model.layers[0][0]
        True
    """
    return [layer for entry in text_model.layers for layer in _inside(entry)]


def cross_layers(text_model: Any) -> list[Any]:
    """The cross-attention decoder layers of an `MllamaTextModel`, like `decoder_layers`."""
    return [layer for layer in decoder_layers(text_model) if _is_cross(layer)]


def first_cross_layer(text_model: Any) -> Any:
    """The first cross-attention decoder layer of what `find_text_model` has found, or a wrapper that hands on its attributes."""
    entry, layer = next((entry, one) for entry in text_model.layers for one in _inside(entry) if _is_cross(one))
    return entry if hasattr(entry, "cross_attn") else layer


def attention_of(layer: Any) -> Any:
    """The attention of a cross-attention decoder layer, or a wrapper that hands on its attributes."""
    return layer.cross_attn if hasattr(layer.cross_attn, "layer_idx") else attentions_in(layer)[0]


def attentions_in(layer: Any) -> list[Any]:
    """The attention of a cross-attention decoder layer and its copies, out of their wrapper."""
    found = [one for one in layer.cross_attn.modules() if isinstance(one, MllamaTextCrossAttention)]
    return found or [layer.cross_attn]


def parts_of(model: torch.nn.Module) -> Parts:
    """The parts of a model, or of what a wrapper wraps.

    Raises:
        ValueError: there is no `MllamaTextModel`, as for `find_text_model`, or two of its layers have the same place.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> parts = parts_of(load_small_model()[0])
        >>> sorted(parts.cross_places + parts.self_places) == list(range(len(parts.text_model.layers)))
        True
    """
    text_model = find_text_model(model)
    cross, attentions = cross_layers(text_model), []
    for layer in cross:
        attentions += attentions_in(layer)
    around = [module for module in model.modules() if isinstance(module, MllamaModel | MllamaTextModel)]
    return Parts(text_model, around, cross, attentions, *_places(text_model))


def _places(text_model: Any) -> tuple[list[int], list[int]]:
    """Where in a cache the cross-attention layers have their places, and the self-attention layers."""
    cross_places: list[int] = []
    self_places: list[int] = []
    seen: dict[int, int] = {}
    for number, entry in enumerate(text_model.layers):
        own = {
            (attention_of(one) if _is_cross(one) else one.self_attn).layer_idx: _is_cross(one) for one in _inside(entry)
        }
        for place, crosses in own.items():
            if place in seen:
                raise ValueError(
                    f"Decoder layers {seen[place]} and {number} of this model both say layer_idx={place}, which is their place "
                    "in a cache: each would read what the other has written. Give every layer's attention a layer_idx of its own "
                    "(layer.self_attn.layer_idx, layer.cross_attn.layer_idx)."
                )
            seen[place] = number
            (cross_places if crosses else self_places).append(place)
    return cross_places, self_places


def check_layers_get_caches(text_model: Any) -> None:
    """Raise `ValueError` if transformers would run decoder layers of an `MllamaTextModel` without the cache.

    It does so in training mode with gradient checkpointing (from 5.24 on only where gradients are computed), after the hooks have
    run: nothing is cached, so every token after the first would be read without its past.
    """
    if checkpointing_keeps_caches() and not torch.is_grad_enabled():
        return
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in decoder_layers(text_model)):
        raise ValueError(
            "A TrimmedCache was given to a model in training mode with gradient checkpointing, in which transformers passes no "
            "cache to the layers. Call model.eval() before generating, and model.train() to go on training."
        )


def check_reads_caches(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a model, or the peft model around it that is generating, does not read the cache that it is given.

    With prefix tuning peft hands on a cache of its own, which holds the prefix.
    """
    generating = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    config = getattr(generating, "active_peft_config", None)
    if config is not None and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            "The model has an active prefix-tuning adapter, which is itself a cache: peft puts it in the trimmed one's place. "
            "Use another cache_implementation for it, LoRA instead of a prefix, or model.disable_adapter()."
        )


@contextlib.contextmanager
def whole_weights(model: torch.nn.Module, *parts: torch.nn.Module) -> Iterator[None]:
    """Within this context parts of a model have their weights whole, as in a forward of the model, though FSDP2 spreads them.

    For parts that run by themselves. All processes have to enter it.
    """
    near = {id(inner) for part in parts for inner in part.modules()}
    spread: list[Any] = [one for one in model.modules() if hasattr(one, "unshard") and hasattr(one, "reshard")]
    spread = [one for one in spread if not near.isdisjoint(id(inner) for inner in one.modules())]
    for one in spread:
        one.unshard()
    try:
        yield
    finally:
        for one in spread:
            one.reshard()


def _inside(entry: Any) -> list[Any]:
    """The decoder layers in an entry of `layers`, by what they have of their own: wrappers hand on what the wrapped ones have."""
    return [one for one in entry.modules() if not {"cross_attn", "self_attn"}.isdisjoint(one._modules)]


def _is_cross(layer: Any) -> bool:
    return isinstance(layer, MllamaCrossAttentionDecoderLayer)


def _crosses(text_model: Any) -> bool:
    return 0 < len(cross_layers(text_model)) < len(decoder_layers(text_model))
