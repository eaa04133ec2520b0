"""The selection rule, restated slowly from eager attention maps. Shares no code with the package."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch


def first_cross_attention_map(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stock's attention map of the first cross-attention layer in a plain prefill: (batch, heads, rows, tokens)."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    maps: list[torch.Tensor] = []
    for module in eager.modules():
        if hasattr(module, "cross_attn"):
            module.cross_attn.register_forward_hook(lambda _module, _args, output: maps.append(output[1]))
            break
    with torch.no_grad():
        eager(**inputs, use_cache=False)
    return maps[0]


def kept_by_rule(model: Any, inputs: dict[str, torch.Tensor], ratio: float) -> list[list[int]]:
    """For every sample the visual tokens that decoding can read under `top_k_ratio=ratio`, token by token."""
    return [sorted(least) for least, _ in _bounds(first_cross_attention_map(model, inputs), inputs, ratio, 0.0)]


def check_kept(
    kept: list[torch.Tensor],
    model: Any,
    inputs: dict[str, torch.Tensor],
    ratio: float,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that `kept` is what the rule keeps, up to tokens whose scores lie so near the border that rounding decides.

    Kernels of another CPU add in another order. Where each logit is off by d, two softmax weights of a row change their places
    only if one is less than exp(2d) times the other. d is what two roundings in `dtype`, the model's own if nothing is said, do
    to the largest logit; that is half of the span of the logits, which the map shows.
    """
    attention = first_cross_attention_map(model, inputs)
    weights = attention.float()
    seen = weights[weights > 0]
    span = 1.0 + math.log(float(seen.max()) / float(seen.min())) if len(seen) else 1.0
    rounding = torch.finfo(dtype or model.dtype).eps / 2
    tolerance = math.expm1(2 * 2 * rounding * span / 2)
    bounds = _bounds(attention, inputs, ratio, tolerance)
    assert len(kept) == len(bounds)
    for sample, (least, most) in zip(kept, bounds, strict=True):
        found = set(sample.tolist())
        assert least <= found <= most, f"missing {sorted(least - found)}, too many {sorted(found - most)}"


def _bounds(
    attention: torch.Tensor, inputs: dict[str, torch.Tensor], ratio: float, tolerance: float
) -> list[tuple[set[int], set[int]]]:
    """For every sample the tokens that are kept if scores are off by a share of `tolerance`, and those that may be."""
    batch, heads, rows, tokens = attention.shape
    patches = tokens // inputs["cross_attention_mask"][0, 0].numel()
    result = []
    for sample in range(batch):
        tiles = inputs["cross_attention_mask"][sample].reshape(rows, -1).tolist()
        reads = [[bool(tiles[row][token // patches]) for token in range(tokens)] for row in range(rows)]
        is_text = [bool(flag) for flag in inputs["attention_mask"][sample].tolist()]
        query_rows = [row for row in range(rows) if is_text[row] and any(reads[row])]
        if not query_rows:
            result.append((set(range(tokens)), set(range(tokens))))
            continue
        groups: dict[tuple[bool, ...], list[int]] = {}
        for token in range(tokens):
            pattern = tuple(reads[row][token] for row in query_rows)
            if any(pattern):
                groups.setdefault(pattern, []).append(token)
        least: set[int] = set()
        most: set[int] = set()
        for pattern, members in groups.items():
            readers = [row for row, may_read in zip(query_rows, pattern, strict=True) if may_read]
            k = max(1, math.ceil(ratio * len(members)))
            for head in range(heads):
                score = attention[sample, head, readers].float().mean(dim=0).tolist()
                ranking = sorted(members, key=lambda token: (-score[token], token))
                # Sure of its place is what beats the best that is left out, possible what comes near the last that is kept.
                last_in, first_out = score[ranking[k - 1]], score[ranking[k]] if k < len(members) else -math.inf
                least.update(token for token in ranking[:k] if score[token] >= first_out * (1 + tolerance))
                most.update(token for token in ranking[k:] if score[token] * (1 + tolerance) > last_in)
                most.update(ranking[:k])
        last = reads[max(row for row in range(rows) if is_text[row])]  # padding after the text decides nothing
        readable = {token for token in range(tokens) if last[token] or not any(last)}
        result.append((least & readable, most & readable))
    return result
