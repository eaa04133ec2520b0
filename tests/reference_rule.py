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
    attention = first_cross_attention_map(model, inputs)
    batch, heads, rows, tokens = attention.shape
    patches = tokens // inputs["cross_attention_mask"][0, 0].numel()
    result = []
    for sample in range(batch):
        tiles = inputs["cross_attention_mask"][sample].reshape(rows, -1).tolist()
        reads = [[bool(tiles[row][token // patches]) for token in range(tokens)] for row in range(rows)]
        is_text = [bool(flag) for flag in inputs["attention_mask"][sample].tolist()]
        voters = [row for row in range(rows) if is_text[row] and any(reads[row])]
        if not voters:
            result.append(list(range(tokens)))
            continue
        groups: dict[tuple[bool, ...], list[int]] = {}
        for token in range(tokens):
            pattern = tuple(reads[row][token] for row in voters)
            if any(pattern):
                groups.setdefault(pattern, []).append(token)
        kept: set[int] = set()
        for pattern, members in groups.items():
            readers = [row for row, may_read in zip(voters, pattern, strict=True) if may_read]
            k = max(1, math.ceil(ratio * len(members)))
            for head in range(heads):
                score = attention[sample, head, readers].float().mean(dim=0)
                ranking = sorted(members, key=lambda token: (-float(score[token]), token))
                kept.update(ranking[:k])
        last = reads[max(row for row in range(rows) if is_text[row])]
        result.append([token for token in sorted(kept) if last[token] or not any(last)])
    return result
