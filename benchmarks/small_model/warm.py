"""Initial weights of a finer model from the shipped one: what it has learned about where to look is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import MllamaForConditionalGeneration

from trim_plugin.arithmetic import tile_tokens


def finer_positions(positions: torch.Tensor, patches: int) -> torch.Tensor:
    """Position embeddings (..., 1 + n², width), the class token's first, for ``patches`` = 1 + m² tokens, bilinearly."""
    *lead, coarse, width = positions.shape
    old, new = round((coarse - 1) ** 0.5), round((patches - 1) ** 0.5)
    grid = positions[..., 1:, :].reshape(-1, old, old, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    finer = grid.permute(0, 2, 3, 1).reshape(*lead, new * new, width)
    return torch.cat([positions[..., :1, :], finer], dim=-2)


def fewer_heads(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Key or value weights (heads × d, width) for fewer heads: the mean of every group (Ainslie et al. 2023, 2305.13245).

    ``rows`` is the fewer heads × d. Heads have d = 16 rows.
    """
    heads = weight.unflatten(0, (-1, 16))
    return heads.unflatten(0, (rows // 16, -1)).mean(1).flatten(0, 1)


@torch.no_grad()
def warm_start(model: MllamaForConditionalGeneration, coarse: MllamaForConditionalGeneration) -> None:
    """Fill ``model`` with the weights of ``coarse``, which has fewer patches a tile and more key-value heads."""
    vision = model.config.vision_config
    patches = tile_tokens(vision)
    given = coarse.state_dict()
    for name, weight in model.state_dict().items():
        old = given[name]
        if name.endswith("gated_positional_embedding.embedding"):
            old = finer_positions(old, patches)
        elif name.endswith("gated_positional_embedding.tile_embedding.weight"):
            by_tile = old.reshape(len(old), vision.max_num_tiles, -1, vision.hidden_size)
            old = finer_positions(by_tile, patches).flatten(1)
        elif old.shape != weight.shape:  # key and value projections
            old = fewer_heads(old, len(weight))
        weight.copy_(old)
