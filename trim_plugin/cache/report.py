"""What a trimmed cache holds, in tokens and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from trim_plugin.arithmetic import format_bytes


@dataclasses.dataclass(frozen=True)
class TrimReport:
    """Tokens per sample, bytes for the whole batch, counted from the tensors that are held.

    Args:
        total_tokens: visual tokens that the pictures became, padding tiles included, per sample.
        visible_tokens: those that at least one text row other than padding may read, per sample.
        kept_tokens: those that decoding can read, per sample.
        cross_kv_bytes: bytes of the tensors that hold cross-attention keys and values (scales of quantized ones and
            padding between samples included).
        stock_cross_kv_bytes: bytes that transformers' own cache holds for the same pictures.
        self_kv_bytes: bytes of the self-attention layers' keys and values.

    Example:
        >>> report = TrimReport([6404], [1601], [600], 19_660_800, 209_846_272, 1_048_576)
        >>> round(report.kept_share, 3), round(report.cross_kv_ratio, 3)
        (0.375, 0.094)
        >>> print(report)
        visual tokens: 600 kept of 1601 visible (37.5 %), 6404 in all
        cross-attention KV: 18.8 MiB instead of 200.1 MiB (9.4 % of stock)
        self-attention KV: 1.0 MiB
    """

    total_tokens: list[int]
    visible_tokens: list[int]
    kept_tokens: list[int]
    cross_kv_bytes: int
    stock_cross_kv_bytes: int
    self_kv_bytes: int

    @property
    def kept_share(self) -> float:
        """Kept tokens over visible tokens of the batch; 0.0 without visual tokens."""
        return sum(self.kept_tokens) / sum(self.visible_tokens) if sum(self.visible_tokens) else 0.0

    @property
    def cross_kv_ratio(self) -> float:
        """Cross KV bytes over stock's; 0.0 without visual tokens."""
        return self.cross_kv_bytes / self.stock_cross_kv_bytes if self.stock_cross_kv_bytes else 0.0

    def __str__(self) -> str:
        if not sum(self.total_tokens):
            return f"no visual tokens\nself-attention KV: {format_bytes(self.self_kv_bytes)}"
        lines = []
        for sample, (total, visible, kept) in enumerate(
            zip(self.total_tokens, self.visible_tokens, self.kept_tokens, strict=True)
        ):
            prefix = f"sample {sample}, " if len(self.total_tokens) > 1 else ""
            share = f"{100 * kept / visible:.1f} %" if visible else "no text row reads them"
            lines.append(f"{prefix}visual tokens: {kept} kept of {visible} visible ({share}), {total} in all")
        lines.append(f"cross-attention KV: {self._against_stock()}")
        lines.append(f"self-attention KV: {format_bytes(self.self_kv_bytes)}")
        return "\n".join(lines)

    def _against_stock(self) -> str:
        held, stock = format_bytes(self.cross_kv_bytes), format_bytes(self.stock_cross_kv_bytes)
        return f"{held} instead of {stock} ({100 * self.cross_kv_ratio:.1f} % of stock)"

    def _repr_html_(self) -> str:
        """The report as a table, which a notebook shows."""
        lines = [["sample", "kept", "visible", "in all"]]
        for sample, counts in enumerate(zip(self.kept_tokens, self.visible_tokens, self.total_tokens, strict=True)):
            lines.append([str(sample), *(f"{count:,}" for count in counts)])
        header, *rows = [f"<td>{'</td><td>'.join(line)}</td>" for line in lines]
        visual = (
            f"<table><tr>{header.replace('td>', 'th>')}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
            f"<p>Cross-attention KV: {self._against_stock()}</p>"
        )
        seen = visual if sum(self.total_tokens) else "<p>no visual tokens</p>"
        return f"{seen}<p>Self-attention KV: {format_bytes(self.self_kv_bytes)}</p>"


def held_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages behind the tensors, each storage once: a small view of a large tensor holds all of it.

    Example:
        >>> whole = torch.zeros(10)
        >>> held_bytes([whole[:2], whole[2:4], None])
        40
    """
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def stored_tensors(layer: Any) -> list[torch.Tensor]:
    """The plain tensors in which a self-attention layer, quantized or not, holds keys and values.

    Example:
        >>> from transformers.cache_utils import DynamicLayer
        >>> layer = DynamicLayer()
        >>> _ = layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        >>> held_bytes(stored_tensors(layer))
        192
    """
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return [tensor for name in names for tensor in _plain_tensors(getattr(layer, name, None))]


def _plain_tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, tuple):
        return [tensor for entry in part for tensor in _plain_tensors(entry)]
    if not isinstance(part, torch.Tensor):
        return []
    if hasattr(part, "__tensor_flatten__"):  # quanto's tensors hold their codes, scales and shifts in other tensors
        return [tensor for name in part.__tensor_flatten__()[0] for tensor in _plain_tensors(getattr(part, name))]
    return [part]
