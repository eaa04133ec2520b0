"""Cross-attention keys and values in 8 or 4 bits, with bitsandbytes' blockwise functions.

A picture's keys and values are written once and read at every decoding step, so they are quantized once, after the prefill
has trimmed them, and dequantized layer by layer while they are read.

A block of 64 values with one scale never crosses a visual token. Reordering beams, selecting samples, dropping tokens and
appending a later picture therefore only move codes and scales: nothing is ever quantized twice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import cache_utils

from trim_plugin.cache.layers import CrossAttentionLayer, joined, take_tokens
from trim_plugin.cache.sources import SourceMap
from trim_plugin.kv_formats import BLOCK, KV_FORMATS, Quantized


def require_bitsandbytes(what: str) -> None:
    """Raise `ImportError` saying what to install, unless bitsandbytes can be imported. Does not import it.

    Where some CPU kernels cannot be fetched, bitsandbytes warns of it as soon as it is imported and uses its own: not shown.

    Example:
        >>> require_bitsandbytes("kv_quantization='int8'")
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{what} needs bitsandbytes, which is not installed. Install it: pip install 'trim-plugin[quantization]'."
        )
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


@dataclasses.dataclass(frozen=True)
class QuantizedTokens:
    """Keys or values of visual tokens as codes and scales, both with the tokens in their second dimension.

    Args:
        codes: uint8 (batch, tokens, bytes a token).
        scales: float32 (batch, tokens, blocks a token), the largest absolute value of every block.
        heads: key-value heads.
        head_dim: values a head.
        dtype: what it is dequantized to.
        format: a name of `KV_FORMATS`.
        levels: what the codes stand for, see `kv_formats.Quantized`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    heads: int
    head_dim: int
    dtype: torch.dtype
    format: str
    levels: torch.Tensor | None = None

    @classmethod
    def of(cls, states: torch.Tensor, format: str) -> QuantizedTokens:
        """Quantize (batch, heads, tokens, head_dim), a float tensor.

        Example:
            >>> states = torch.randn(1, 2, 5, 64)
            >>> stored = QuantizedTokens.of(states, "int8")
            >>> stored.codes.shape, stored.scales.shape
            (torch.Size([1, 5, 128]), torch.Size([1, 5, 2]))
            >>> bool((stored.dequantized() - states).norm() < 0.02 * states.norm())
            True
        """
        batch, heads, tokens, head_dim = states.shape
        rows = states.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
        # Padded with zeros to whole blocks; real models have a multiple of 64 values a token.
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).contiguous()
        made = KV_FORMATS[format].quantize(rows)
        return cls(made.codes, made.scales, heads, head_dim, states.dtype, format, made.levels)

    def dequantized(self) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) in `dtype`."""
        rows = KV_FORMATS[self.format].dequantize(Quantized(self.codes, self.scales, self.levels), self.dtype)
        rows = rows[..., : self.heads * self.head_dim]
        return rows.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTokens:
        """The same with `move` applied to codes and scales; it may reorder, repeat or drop samples and tokens."""
        return dataclasses.replace(self, codes=move(self.codes).contiguous(), scales=move(self.scales).contiguous())

    @classmethod
    def joined(cls, parts: Sequence[QuantizedTokens], width: int) -> QuantizedTokens:
        """The samples of several batches one after the other, padded to `width` tokens (which read as zeros)."""
        codes, scales = (joined([getattr(part, name) for part in parts], width, dim=1) for name in ("codes", "scales"))
        return dataclasses.replace(parts[0], codes=codes, scales=scales)

    def followed_by(self, later: QuantizedTokens) -> QuantizedTokens:
        """These tokens and then `later` ones of the same samples."""
        return dataclasses.replace(
            self,
            codes=torch.cat([self.codes, later.codes], dim=1),
            scales=torch.cat([self.scales, later.scales], dim=1),
        )


class QuantizedCrossAttentionLayer(CrossAttentionLayer):
    """A `CrossAttentionLayer` that stores codes and scales between forwards.

    Within the forward that brings a picture it holds full tensors, as its base class does. `release()`, called when the
    forward is done with the layer, quantizes them. Later, reading `keys` or `values` dequantizes them once; the full tensors
    live until the next `release()`, so one layer's at a time exist during decoding. (Reading them outside a forward
    leaves them there until the next one.)

    Args:
        format: a name of `KV_FORMATS`.

    Raises:
        ImportError: bitsandbytes is not installed.

    Example:
        >>> layer = QuantizedCrossAttentionLayer("int8")
        >>> layer.expected = True
        >>> _ = layer.update(torch.ones(1, 2, 5, 32), torch.ones(1, 2, 5, 32))
        >>> layer.keep(torch.tensor([[0, 3]]))
        >>> layer.release()
        >>> layer.keys.shape, [tensor.dtype for tensor in layer.held_tensors()][:2]
        (torch.Size([1, 2, 2, 32]), [torch.uint8, torch.float32])
    """

    def __init__(self, format: str, sources: SourceMap | None = None) -> None:
        require_bitsandbytes(f"kv_quantization={format!r}")
        self.format = format
        self._stored: dict[str, QuantizedTokens] | None = None
        #: A later picture's tokens, between `update` and what stores them.
        self._new: dict[str, torch.Tensor] | None = None
        super().__init__(sources)

    def _read(self, name: str) -> torch.Tensor | None:
        if self._held[name] is None and self._stored is not None:
            self._held[name] = self._stored[name].dequantized()
        return super()._read(name)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a picture's keys and values, see the base class. Of a later picture only the new part will be quantized."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._stored is not None:
            self._new = {"keys": key_states, "values": value_states}
        return keys, values

    def replace(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these instead of the tokens of the picture that has just come, see the base class."""
        if self._stored is None:
            super().replace(first, keys, values)
        else:
            self._new, self._held = {"keys": keys, "values": values}, {"keys": None, "values": None}

    def settle(self) -> None:
        """Lay full tensors out for reading; codes and scales lie as they are read."""
        if self._stored is None:
            super().settle()

    def release(self) -> None:
        """Quantize what a prefill has left; drop the full tensors."""
        if self._stored is None:
            if self.get_seq_length() == 0:
                return
            self._stored = {
                name: QuantizedTokens.of(states, self.format)
                for name, states in self._held.items()
                if states is not None
            }
        self._store_new()
        self._held = {"keys": None, "values": None}

    def _store_new(self) -> None:
        """Quantize what came last, behind what is stored."""
        if self._new is not None and self._stored is not None:
            self._stored = {
                name: tokens.followed_by(QuantizedTokens.of(self._new[name], self.format))
                for name, tokens in self._stored.items()
            }
        self._new = None

    def keep(self, positions: torch.Tensor) -> None:
        """Hold only the tokens at `positions`, int64 (batch, kept)."""
        if self._stored is None:
            super().keep(positions)
        else:
            self._store_new()
            self._move(lambda tensor: take_tokens(tensor, positions.to(tensor.device)))

    def get_seq_length(self) -> int:
        """Visual tokens held (a batch's longest sample), without dequantizing."""
        if self._stored is None:
            return super().get_seq_length()
        new = 0 if self._new is None else self._new["keys"].shape[2]
        return self._stored["keys"].codes.shape[1] + new

    def take_entries(self, entries: torch.Tensor) -> None:
        """Hold these entries only, see the base class."""
        if self._stored is None:
            super().take_entries(entries)
        else:
            self._move(lambda tensor: tensor.index_select(0, entries.to(tensor.device)))

    def part(self, samples: slice, sources: SourceMap) -> QuantizedCrossAttentionLayer:
        """A layer that holds the entries of these samples alone, see the base class."""
        part = super().part(samples, sources)
        if self._stored is not None:
            part._stored = {name: tokens.moved(lambda tensor: tensor[samples]) for name, tokens in self._stored.items()}
        return part

    def join(self, parts: Sequence[QuantizedCrossAttentionLayer], width: int) -> None:
        """Hold what the parts of a batch hold, see the base class. Codes are moved, nothing is quantized again."""
        self._held = {"keys": None, "values": None}
        self._stored = {
            name: QuantizedTokens.joined([part._stored[name] for part in parts if part._stored], width)
            for name in self._held
        }
        self.is_initialized = True

    def reset(self) -> None:
        """Forget everything."""
        self._stored = self._new = None
        super().reset()

    def held_tensors(self) -> list[torch.Tensor | None]:
        """Codes and scales; before they exist the full tensors. What is only there for reading is not counted."""
        if self._stored is None:
            return list(self._held.values())
        return [tensor for tokens in self._stored.values() for tensor in (tokens.codes, tokens.scales)]

    def _move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._stored is not None:
            self._stored = {name: tokens.moved(move) for name, tokens in self._stored.items()}
        self._held = {"keys": None, "values": None}


def quantized_self_layer(kind: str) -> Any:
    """A quantized self-attention layer of transformers, with its default settings, for `TrimConfig.self_kv_quantization`.

    Raises:
        ImportError: this transformers has no such layer, or the package behind it is missing.

    Example:
        >>> type(quantized_self_layer("fp8")).__name__
        'Fp8QuantizedLayer'
    """
    name = {"fp8": "Fp8QuantizedLayer", "quanto": "QuantoQuantizedLayer"}[kind]
    made = getattr(cache_utils, name, None)
    if made is None:
        raise ImportError(
            f"self_kv_quantization={kind!r} needs transformers' {name}, which transformers {transformers.__version__} "
            "does not have. Upgrade transformers, or use another self_kv_quantization."
        )
    return made()
