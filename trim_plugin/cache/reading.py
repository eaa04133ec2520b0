"""The attention function of decoding: a step reads every kept token once, however many samples and heads share it.

Transformers hands `layers[i].keys` and `.values` to the attention function that a module's configuration names. Ours gets a
`Lent` instead of a tensor and reads each width class as it lies: copies of a source, and the query heads that share a
key-value head, are query rows on the same keys. So nothing is gathered, repeated or padded, and the bytes read are the
bytes held.
"""

from __future__ import annotations

import threading
import typing
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mllama.modeling_mllama import eager_attention_forward

from trim_plugin.cache.kept import KeptTokens
from trim_plugin.cache.regrouping import padded_columns
from trim_plugin.selection.visibility import add_log_sizes, open_mask

NAME = "trim_plugin"
_installing = threading.Lock()  # two threads would put one configuration into another


class _InThisThread(threading.local):
    """Whether a model in this thread reads what a trimmed cache lends; other threads may use the same model meanwhile."""

    lending = False


in_this_thread = _InThisThread()


class NamingOurs:
    """A cross-attention module's configuration as it is, but while it reads what a trimmed cache lends it names our function.

    Copies and pickles are the plain configuration, `real`, so that a saved model needs nothing of this package.
    """

    def __init__(self, real: Any) -> None:
        self.real = real

    @property
    def _attn_implementation(self) -> str:
        # A graph is compiled for one kind of cache; in it, ours hands on what it does not know.
        lending = torch.compiler.is_compiling() or in_this_thread.lending
        return NAME if lending else self.real._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name == "real":  # not set yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.real, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return typing.cast, (object, self.real)  # which returns the configuration itself


def install(attention: Any) -> None:
    """Let a cross-attention module be able to ask for ours."""
    with _installing:
        if not isinstance(attention.config, NamingOurs):
            attention.config = NamingOurs(attention.config)


def forget(attention: Any) -> None:
    """Give a module its plain configuration again."""
    if isinstance(attention.config, NamingOurs):
        attention.config = attention.config.real


class ReadLayer(typing.Protocol):
    """What is read of a cross-attention layer; `CrossAttentionLayer` says what each of these is."""

    kept: KeptTokens | Any
    stores: list[Any]
    places: int
    masks: list[torch.Tensor | None]
    gather: tuple[torch.Tensor, torch.Tensor] | None

    def side_by_side(self) -> Any:
        """All sources' tokens in one store."""


class Lent:
    """A layer's keys or values as transformers' module is handed them in decoding.

    Knows its shape without a look at the tensors. Whoever treats it as a tensor (another attention function, a user) gets a
    padded one with a row for every sample of the batch, made for the call.
    """

    def __init__(self, layer: ReadLayer, name: str) -> None:
        #: The layer that holds them, and "keys" or "values".
        self.layer, self.name = layer, name

    def numel(self) -> int:
        """More than 0 where anything is held: all that transformers asks of a layer before it decides to run it."""
        return self.layer.places

    def tensor(self) -> torch.Tensor:
        """(batch, key-value heads, visual tokens of the fullest sample, head_dim); zeros in padding."""
        keys, values = self.layer.side_by_side().read()
        return _expanded_to_samples(keys if self.name == "keys" else values, self.layer.kept)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = [value.tensor() if isinstance(value, Lent) else value for value in args]
        named = {name: value.tensor() if isinstance(value, Lent) else value for name, value in (kwargs or {}).items()}
        return func(*given, **named)


def attention(
    module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls as the attention function named `trim_plugin`; shapes as in `sdpa_attention_forward`.

    A decoding step with sdpa attention reads each class as it lies. Everything else gets padded tensors and goes on to the
    function that the model is configured for: other implementations, several text rows, maps.
    """
    configured = module.config.real if isinstance(module.config, NamingOurs) else module.config
    implementation = configured._attn_implementation
    lent = isinstance(key, Lent)
    if lent and implementation == "sdpa" and query.shape[2] == 1 and not kwargs.get("dropout"):
        return _read_once(key.layer, query, module.num_key_value_groups, kwargs.get("scaling")), None
    if lent:
        if attention_mask is None and query.shape[2] == 1:
            attention_mask = _padded_mask(key.layer)
        key, value = (_expanded_to_samples(states, key.layer.kept) for states in key.layer.side_by_side().read())
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return stock(module, query, key, value, attention_mask, **kwargs)


def _read_once(layer: ReadLayer, query: torch.Tensor, shared: int, scaling: float | None) -> torch.Tensor:
    """(batch, 1, heads, head_dim) of queries (batch, heads, 1, head_dim), `shared` of which read the same key-value head."""
    _, heads, _, dim = query.shape
    if layer.gather is not None:
        query = query.index_select(0, layer.gather[0])
    results, first = [], 0
    for own, store, mask in zip(layer.kept.classes, layer.stores, layer.masks, strict=True):
        sources, copies = len(own.sources), own.copies
        if store.shape[1] == 0:  # samples without pictures read nothing
            results.append(query.new_zeros(sources * copies, 1, heads, dim))
            first += sources * copies
            continue
        keys, values = store.read()
        split = (sources, copies, heads // shared, shared, dim)
        rows = query[first : first + sources * copies].reshape(split).transpose(1, 2)
        rows = rows.reshape(sources, heads // shared, copies * shared, dim)
        out = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
        out = out.reshape(sources, heads // shared, copies, shared, dim).transpose(1, 2)
        results.append(out.reshape(sources * copies, 1, heads, dim))
        first += sources * copies
    result = results[0] if len(results) == 1 else torch.cat(results)
    return result if layer.gather is None else result.index_select(0, layer.gather[1])


def _padded_mask(layer: ReadLayer) -> torch.Tensor | None:
    """What a decoding step's row may read of the padded tensors, (batch, 1, 1, tokens); None if everything."""
    kept, device = layer.kept, layer.stores[0].tensors[0].device
    if len(kept.classes) == 1 and kept.in_order:
        return None if layer.masks[0] is None else _expanded_to_samples(layer.masks[0], kept)

    def made() -> torch.Tensor:
        columns = padded_columns(kept)
        return add_log_sizes(open_mask(columns.valid, 1, kept.dtype), columns.sizes).to(device)

    return _expanded_to_samples(kept.once("padded mask", device, made), kept)


def _expanded_to_samples(of_sources: torch.Tensor, kept: KeptTokens) -> torch.Tensor:
    """A row for every sample of the batch, from one for every source; without a copy where that is possible."""
    if not kept.shared:
        return of_sources
    if kept.sources == 1:
        return of_sources.expand(len(kept.order), *[-1] * (of_sources.ndim - 1))
    if kept.in_order and len(kept.classes) == 1:
        return of_sources.repeat_interleave(kept.classes[0].copies, dim=0)
    return of_sources.index_select(0, kept.sources_on(of_sources.device))


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
