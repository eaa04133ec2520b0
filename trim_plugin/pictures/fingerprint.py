"""Which model encoded a picture: a few numbers that tell another model, or one whose projector was trained since."""

from __future__ import annotations

import math
from typing import Any

import torch

#: What is looked at, of an `MllamaModel`: the projector as a whole, and parts of the tower that 4-bit weights leave alone.
PARTS = (
    "multi_modal_projector.weight",
    "multi_modal_projector.bias",
    "vision_model.class_embedding",
    "vision_model.patch_embedding.weight",
    "vision_model.layernorm_post.weight",
    "vision_model.layernorm_post.bias",
)
#: Relative differences up to these are rounding: of sums, and of weights kept in another format.
SAME_FORMAT, OTHER_FORMAT = 1e-4, 1e-2


def fingerprint(model: Any) -> torch.Tensor:
    """Two numbers for every entry of `PARTS`, float32 (parts, 2): its norm, and a weighted sum relative to that.

    NaN where there is nothing to look at: quantized weights, and offloaded ones. Costs one pass over the projector.

    Args:
        model: an `MllamaModel`.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> fingerprint(model.model).shape
        torch.Size([6, 2])
    """
    parameters = dict(model.named_parameters())
    return torch.stack([_numbers(parameters.get(_name(part, parameters))) for part in PARTS])


def difference(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Largest relative difference of two fingerprints where both know something; None if they have nothing in common.

    Example:
        >>> one = torch.tensor([[2.0, 0.5], [float("nan"), float("nan")]])
        >>> difference(one, torch.tensor([[2.0, 0.75], [1.0, 0.1]]))
        0.25
    """
    known = ~(first.isnan() | second.isnan()).any(dim=1)
    if not bool(known.any()):
        return None
    one, other = first[known], second[known]
    norms = (one[:, 0] - other[:, 0]).abs() / one[:, 0].abs().clamp(min=1e-12)
    return float(torch.maximum(norms, (one[:, 1] - other[:, 1]).abs()).max())


def _name(part: str, parameters: dict[str, Any]) -> str:
    """A parameter's name, also where an adapter wraps its module."""
    module, _, leaf = part.rpartition(".")
    wrapped = f"{module}.base_layer.{leaf}"
    return wrapped if wrapped in parameters else part


def _numbers(parameter: torch.Tensor | None) -> torch.Tensor:
    if parameter is None or parameter.is_meta or not parameter.is_floating_point():
        return torch.full((2,), torch.nan)
    with torch.no_grad():
        rows = parameter.float().reshape(parameter.shape[0] if parameter.ndim > 1 else 1, -1)
        height, width = (torch.arange(1, length + 1, device=rows.device) for length in rows.shape)
        # Two waves that don't repeat within a layer's size, so that every weight counts with a factor of its own.
        weighted = (height * math.sqrt(2)).sin() @ rows @ (width * math.sqrt(3)).cos()
        norm = rows.norm()
        return torch.stack([norm, weighted / norm.clamp(min=1e-12)]).cpu()
