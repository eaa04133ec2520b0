"""Formats of quantized cross-attention keys and values: `KV_FORMATS` is the one place that names them.

Configuration, layers, planner and command line read the table. A format says how many bits a value takes, and how rows of values
become codes and scales and come back; torch and bitsandbytes, whose blockwise functions do it, are loaded when they are called.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Values that share a scale. 64 costs 1/16 of an 8-bit tensor for the scales (float32) and fits all formats' kernels.
BLOCK = 64
SCALE_BYTES = 4


def require_bitsandbytes(what: str) -> None:
    """Raise `ImportError` saying what to install, unless bitsandbytes can be imported. Does not import it.

    Where some CPU kernels cannot be fetched, bitsandbytes warns of it as soon as it is imported and uses its own: not shown.

    Example:
        >>> require_bitsandbytes("kv_quantization='int8'")
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{what} needs bitsandbytes, which is not installed. Install it: pip install bitsandbytes accelerate"
        )
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


class KVFormat(ABC):
    """One format. Rows are (batch, tokens, values), values a multiple of `BLOCK`."""

    #: Of a code.
    bits: int

    def token_bytes(self, values: int) -> int:
        """Bytes of one token's keys, or of its values, of that many numbers: codes and scales of whole blocks.

        Example:
            >>> KV_FORMATS["int8"].token_bytes(1024), KV_FORMATS["nf4"].token_bytes(1024)
            (1088, 576)
        """
        return math.ceil(values / BLOCK) * (BLOCK * self.bits // 8 + SCALE_BYTES)

    @abstractmethod
    def quantize(self, rows: torch.Tensor) -> Quantized:
        """Codes and scales of rows."""

    @abstractmethod
    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """The rows again, in `dtype`."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows of values as codes and scales.

    Args:
        codes: uint8 (batch, tokens, bytes a token).
        scales: float32 (batch, tokens, blocks a token), the largest absolute value of every block.
        levels: float32 (256,), what the codes stand for; None for formats whose kernels know it. Held, so that a compiled graph
            takes it as an input.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor | None = None


class EvenLevels(KVFormat):
    """8 bits, 255 evenly spaced levels. Source: blockwise quantization, Dettmers et al. 2022, arXiv 2110.02861."""

    bits = 8

    def quantize(self, rows: torch.Tensor) -> Quantized:
        """Codes and scales of rows."""
        from bitsandbytes import functional

        levels = _even_levels(rows.device)
        codes, state = functional.quantize_blockwise(rows, code=levels, blocksize=BLOCK)
        return Quantized(codes, state.absmax.view(*rows.shape[:2], -1), levels)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """The rows again, in `dtype`."""
        from bitsandbytes import functional

        state = _state(quantized, dtype)
        return functional.dequantize_blockwise(quantized.codes, state).view(state.shape)


class FourBits(KVFormat):
    """4 bits; `kind` is bitsandbytes' name of the levels. "nf4", normal quantiles: Dettmers et al. 2023, arXiv 2305.14314."""

    bits = 4

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def quantize(self, rows: torch.Tensor) -> Quantized:
        """Codes and scales of rows."""
        import bitsandbytes  # noqa: F401 - brings the operator
        import torch

        # The operator itself: `functional.quantize_4bit` also copies a table of levels to the device, which is not needed here.
        quantize = torch.ops.bitsandbytes.quantize_4bit.default
        codes, scales = quantize(rows, BLOCK, self.kind, torch.uint8)
        return Quantized(codes.view(*rows.shape[:2], -1), scales.view(*rows.shape[:2], -1))

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """The rows again, in `dtype`."""
        from bitsandbytes import functional

        state = _state(quantized, dtype, self.kind)
        return functional.dequantize_4bit(quantized.codes.view(-1, 1), state).view(state.shape)


def _state(quantized: Quantized, dtype: torch.dtype, kind: str | None = None) -> Any:
    """What bitsandbytes' functions are told of codes, and the shape of the rows."""
    import torch
    from bitsandbytes import functional

    batch, tokens, blocks = quantized.scales.shape
    return functional.QuantState(
        absmax=quantized.scales.flatten(),
        shape=torch.Size((batch, tokens, blocks * BLOCK)),
        code=quantized.levels,
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
    )


@functools.lru_cache(maxsize=16)
def _even_levels(device: torch.device) -> torch.Tensor:
    """255 levels: 0.6 % error on normal values, bitsandbytes' default levels have 1.0 %."""
    import torch
    from bitsandbytes import functional

    with torch.device("cpu"):  # whatever a program has made its default
        levels = functional.create_linear_map(signed=True, total_bits=8)
    return levels.to(device)


#: What `TrimConfig(kv_quantization=...)` and `--kv-quantization` allow.
KV_FORMATS: dict[str, KVFormat] = {"int8": EvenLevels(), "nf4": FourBits("nf4")}
