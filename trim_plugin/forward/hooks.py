"""The public cache, and the hooks that fill it: plain functions without state, inert for any other cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.models.mllama.modeling_mllama import MllamaModel

from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.reading import NamingOurs, in_this_thread, install
from trim_plugin.compat import CACHE, cache_of, unsupported
from trim_plugin.config import DEFAULT, TrimConfig
from trim_plugin.contract import arguments_of, check_contract, check_modules
from trim_plugin.forward.encoded import ENCODED_AND_PIXELS, EncodedBatch, EncodedSample, check_count, check_samples
from trim_plugin.forward.finding import (
    Hook,
    Owner,
    Parts,
    attaching,
    attention_of,
    check_layers_get_caches,
    check_reads_caches,
    find_text_model,
    parts_of,
    put_on,
    take_off,
)
from trim_plugin.forward.tower import states_in_micro_batches
from trim_plugin.forward.turn import Turn
from trim_plugin.selection.visibility import padding_of

OF_ANOTHER_MODEL = "This TrimmedCache was made for another model. Make one for this model: TrimmedCache(model, ...)."


def attach(model: torch.nn.Module) -> Any:
    """Put the hooks on a model and its cross-attention decoder layers, once; return its `MllamaTextModel`.

    Raises:
        UnsupportedTransformersError: this transformers lacks something that the hooks rely on; none is put on then.
        ValueError: `model` holds no Mllama text model with cross-attention layers.
    """
    parts = parts_of(model)
    _attach(model, parts)
    return parts.text_model


def _attach(model: torch.nn.Module, parts: Parts) -> None:
    check_contract()
    with attaching:
        hooked = all(before_layer in layer._forward_pre_hooks.values() for layer in parts.cross) and all(
            before_model in module._forward_pre_hooks.values() for module in parts.around
        )
        if hooked and all(isinstance(attention.config, NamingOurs) for attention in parts.attentions):
            return  # (a copy of a model has its hooks, but plain configurations)
        check_modules([*parts.around, *parts.cross])
        for module in model.modules():
            take_off(module)  # what is left of them in a model that was saved whole
        for layer in parts.cross:
            put_on(layer, before_layer, after_layer)
        for attention in parts.attentions:
            install(attention)
        for module in parts.around:
            put_on(module, before_model, after_model)
            put_on(module, open_turn if isinstance(module, MllamaModel) else open_text_turn)


def check_attention(model: Any) -> None:
    """Raise `ValueError` if an Mllama model, with or without its tower, runs with flex attention."""
    implementation = getattr(model.config, "text_config", model.config)._attn_implementation
    if implementation is not None and implementation.endswith("flex_attention"):
        raise ValueError(
            f"The trimmed cache does not work with attn_implementation={implementation!r}, whose masks say nothing of padding. "
            'Load the model with attn_implementation="sdpa" or "eager", or call model.set_attn_implementation("sdpa").'
        )


@Hook
def before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the models around the layers: say what cannot work before the tower runs; lend what is held."""
    if torch.compiler.is_compiling():
        return
    cache = _cache_of(kwargs)
    if not isinstance(cache, HeldCache):
        _check_names(kwargs)
        in_this_thread.lending = False  # a forward that failed may have left it on
        return
    check_attention(model)
    if isinstance(cache, TrimmedCache) and not cache.owner.bound:
        cache.bind(model)
    if model.training:
        # Walking through the modules costs more than the rest of the hooks: only where training makes it needful.
        check_layers_get_caches(find_text_model(model))
    in_this_thread.lending = True


@Hook
def after_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the same models: from here on what is held is read as plain tensors."""
    if not torch.compiler.is_compiling():
        in_this_thread.lending = False


@Hook
def open_turn(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an `MllamaModel`: note who may read what, and let pictures be read a few at a time, or encoded ones."""
    cache = _cache_of(kwargs)
    if not isinstance(cache, HeldCache):
        return None
    kwargs, args = _by_name(model, args, kwargs), ()
    text, prepared = _text_of(kwargs), cache.turn
    pictures = None if prepared is None else prepared.pictures
    brings = any(kwargs.get(name) is not None for name in ("pixel_values", "cross_attention_states"))
    if text is None or not (brings or pictures or (cache.kept is not None and text.shape[1] > 1)):
        if prepared is not None and not prepared.begun:
            cache.turn = None  # of a forward that failed: this one is decoding, or text alone
        return None
    if prepared is not None:
        cache.check_finished()
    turn = prepared or Turn()
    if turn.looked != text.shape[1]:
        masks = kwargs.get("cross_attention_mask"), kwargs.get("attention_mask")
        turn.look(cache, text.shape[1], *masks, model.config.vision_config)
    turn.looked = 0  # what was seen is this forward's, should it fail before its turn begins
    cache.turn = turn
    if pictures is not None:
        if brings:
            raise ValueError(ENCODED_AND_PIXELS)
        turn.new = EncodedBatch.of(check_count(pictures, len(text)), text.device, model.dtype, turn.total)
        return args, {**kwargs, "cross_attention_states": turn.new.states}
    pixels = kwargs.get("pixel_values")
    if pixels is None or kwargs.get("cross_attention_states") is not None:
        return None
    if cache.config.tower_share is None and pixels.shape[:2].numel() == 1:
        return None  # one picture, read as transformers reads it
    states = states_in_micro_batches(model, cache, kwargs)
    return None if states is None else (args, {**kwargs, "pixel_values": None, "cross_attention_states": states})


@Hook
def open_text_turn(text_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an `MllamaTextModel`: the last look at a cache before the layers run.

    Called by itself, a text model gets a mask that does not tell padding: it is noted here. What a turn has seen of it,
    transformers need not read.
    """
    cache, kwargs = _cache_of(kwargs), _by_name(text_model, args, kwargs)
    text = _text_of(kwargs)
    if not isinstance(cache, HeldCache) or text is None:
        return None
    rows, brings, mask = text.shape[1], kwargs.get("cross_attention_states") is not None, kwargs.get("attention_mask")
    decodes = not brings and rows == 1
    if decodes and torch.compiler.is_compiling():
        return None  # decoding is kept free of anything that a compiled graph could not hold
    _check_cache(text_model, cache, len(text))
    if decodes:
        cache.turn = None  # one that was prepared, and never begun
    elif cache.turn is not None:
        return (), {**kwargs, "attention_mask": cache.turn.text_mask(text_model, cache, text, mask)}
    elif brings or cache.kept is not None:
        cache.turn = Turn(padding=padding_of(mask, int(cache.get_seq_length()), rows))
    return None


@Hook
def before_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: hand the layer its visual states and mask."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, HeldCache):
        if CACHE not in kwargs:
            _check_names_within(layer, args, kwargs)
        return None
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if kwargs["cross_attention_states"] is None and cache.kept is not None and hidden_states.shape[1] == 1:
        rows = {}  # decoding
        if not torch.compiler.is_compiling() and not cache.kept.all_read:
            rows = {"full_text_row_masked_out_mask": cache.kept.closed_rows_on(hidden_states.device)}
        return args, {**kwargs, "cross_attention_mask": None, **rows}
    attention = attention_of(layer)
    if not isinstance(attention.config, NamingOurs) and not torch.compiler.is_compiling():
        install(attention)  # a copy that was put into the layer since
    cache.turn = cache.turn or Turn()
    cache.turn.place = attention.layer_idx
    if cache.turn.place == cache.cross_layers[0]:
        cache.turn.begin(cache, layer, hidden_states, kwargs)
    if not cache.turn.begun:
        raise RuntimeError(
            "A cross-attention layer ran before the first one: trim_plugin cannot follow this model's order."
        )
    return args, {**kwargs, "cross_attention_states": cache.turn.states, "cross_attention_mask": cache.turn.mask}


@Hook
def after_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: trim what the layer has cached."""
    cache = kwargs.get(CACHE)
    if isinstance(cache, HeldCache) and cache.turn is not None:
        cache.turn.after(cache, layer)


def _check_names(kwargs: dict[str, Any]) -> None:
    """Raise `TypeError` if a trimmed cache is among arguments by a name that this transformers passes on without looking."""
    wrong = [name for name, value in kwargs.items() if isinstance(value, HeldCache)]
    if wrong:
        raise TypeError(
            f"A TrimmedCache was given as {wrong[0]}=, which transformers {transformers.__version__} ignores. "
            f"Give it as {CACHE}=."
        )


def _check_names_within(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedTransformersError` if the model hands its layers a trimmed cache otherwise than by its name."""
    if any(isinstance(value, HeldCache) for value in (*args, *kwargs.values())):
        raise unsupported([f"a call of {type(layer).__name__} with {CACHE}="])


def _check_cache(text_model: Any, cache: HeldCache, batch: int) -> None:
    """Raise `ValueError` unless the cache is this model's, whole, and of this batch size."""
    if cache.owner.text_model() is not text_model:
        raise ValueError(OF_ANOTHER_MODEL)
    if cache.turn is not None:
        cache.check_finished()
    if cache.kept is not None and len(cache.kept.order) != batch:
        raise ValueError(
            f"This TrimmedCache holds {len(cache.kept.order)} samples, but the forward has {batch}. Make a new cache, or bring "
            "this one to the batch size with batch_repeat_interleave or batch_select_indices."
        )


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """A model's cache, which a caller may name as older versions did."""
    return kwargs[CACHE] if kwargs.get(CACHE) is not None else cache_of(kwargs)


def _text_of(kwargs: dict[str, Any]) -> torch.Tensor | None:
    return kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by their names, however they were given."""
    return {**dict(zip(arguments_of(type(model).forward) or (), args, strict=False)), **kwargs} if args else kwargs


class TrimmedCache(HeldCache):
    """A transformers `Cache` whose cross-attention layers hold only the visual tokens that decoding needs.

    `generate(cache_implementation="trimmed")` makes one. By hand, `TrimmedCache(model, TrimConfig(...))` goes into `cache=` of
    `generate` or of a plain forward (`past_key_values=` before transformers 5.24); making it attaches hooks to the model's
    cross-attention layers, which do nothing for any other cache (`trim_plugin.detach(model)` removes them). All state of a
    generation lives here.

    A forward with one text row is taken to be a decoding step, whose row may read what the last prompt row could:
    that is how `generate` extends the mask. A forward with several rows has its mask read.

    Args:
        model: an Mllama model, or a wrapper around one (peft, for instance).
        config: settings; a dict of `TrimConfig`'s fields does as well.
        max_cache_len: text tokens that a static cache has room for; the larger of this and the configuration's counts.
        pictures: encoded pictures (`trim_plugin.encode_pictures`) that the first forward reads instead of `pixel_values`: a
            sample's, or a list with an entry for every sample of the batch (before beams and returned sequences).

    Raises:
        ValueError: the model has no Mllama cross-attention layers, the settings are not allowed, or the pictures were encoded by
            another model.
        TypeError: `config` is neither a `TrimConfig` nor a mapping, or `pictures` are not encoded.
        ImportError: `kv_quantization` or `self_kv_quantization` needs a package that is not installed.

    Example:
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> cache = TrimmedCache(model, {"top_k_ratio": 0.25})
        >>> output = model.generate(**ask(processor), cache=cache, max_new_tokens=4)
        >>> len(cache.kept_indices), cache.report().cross_kv_ratio < 1
        (1, True)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrimConfig | Mapping[str, Any] | None = None,
        *,
        max_cache_len: int | None = None,
        pictures: EncodedSample | Sequence[EncodedSample] | None = None,
    ) -> None:
        # The settings first: a wrong one leaves the model without hooks.
        settings = DEFAULT if config is None else TrimConfig.of(config)
        check_reads_caches(model)
        parts, self.owner = parts_of(model), Owner()
        self.owner.bind(model, parts.text_model)
        super().__init__(parts.cross_places, parts.self_places, settings, max_cache_len)
        if pictures is not None:
            self.show(pictures)
        _attach(model, parts)

    def bind(self, model: torch.nn.Module) -> None:
        """Belong to this model, after being read from a file or sent by another process.

        `generate`, `trim_plugin.prefill` and forwards of a model that carries hooks do it by themselves.

        Args:
            model: the model that the cache was filled by, loaded again, or a wrapper around it.

        Raises:
            ValueError: the cache is bound to another model, or this one has other layers.

        Example:
            >>> import pickle
            >>> from trim_plugin.embedded import load_small_model
            >>> model, _ = load_small_model()
            >>> cache = pickle.loads(pickle.dumps(TrimmedCache(model)))
            >>> cache.bind(model)
        """
        parts, held = parts_of(model), self.layers[self.self_layers[0]].keys
        attention = attention_of(parts.cross[0])
        shape = (attention.num_key_value_heads, attention.head_dim)
        other_heads = isinstance(held, torch.Tensor) and held.ndim == 4 and (held.shape[1], held.shape[3]) != shape
        other_layers = (parts.cross_places, parts.self_places) != (self.cross_layers, self.self_layers)
        if (self.owner.bound and self.owner.text_model() is not parts.text_model) or other_layers or other_heads:
            raise ValueError(OF_ANOTHER_MODEL)
        self.owner.bind(model, parts.text_model)
        _attach(model, parts)

    def show(self, pictures: EncodedSample | Sequence[EncodedSample]) -> None:
        """Let the next forward read these encoded pictures: for a later turn of a conversation that brings new ones.

        Its `cross_attention_mask` covers all pictures so far, as for a turn that brings `pixel_values`.

        Args:
            pictures: a sample's, or a list with an entry for every sample.

        Raises:
            TypeError, ValueError: as for the class.
        """
        samples = check_samples(pictures)
        model = self.owner.model
        known: dict[str, Any] = {}
        if model is not None:
            for sample in samples:
                sample.check_fits(model, known)
        self.turn = Turn(pictures=samples)
