"""Floating-point operations, counted from a configuration. A multiplication and its addition are two; norms, softmax and
activations are left out."""

from __future__ import annotations

from typing import Any

from trim_plugin.arithmetic import layers_before, tile_tokens, tokens_left


def tower_operations(vision: Any, tiles: int | None = None, share: float | None = None) -> int:
    """Operations of the vision tower for one picture: projections, attention's two products, MLPs, and the patch embedding.

    Args:
        vision: an `MllamaVisionConfig`.
        tiles: real tiles of the picture; matters with a share alone.
        share: `TrimConfig.tower_share`: layers before the merging run on all tokens, the others on what is left. None for an
            untouched tower. Choosing and merging are not in it.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> vision = built_in_config("11b").vision_config
        >>> untouched = tower_operations(vision)
        >>> [round(untouched / tower_operations(vision, tiles, 0.5), 2) for tiles in (1, 4)]
        [3.2, 1.97]
    """
    patches = tile_tokens(vision)
    most = vision.max_num_tiles
    all_tokens = most * -(-patches // 8) * 8  # transformers pads tiles to a multiple of 8
    width, local, around = vision.hidden_size, vision.num_hidden_layers, vision.num_global_layers

    def layer(tokens: int) -> int:
        return int(2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * tokens**2 * width)

    embedding = 2 * most * (patches - 1) * vision.num_channels * vision.patch_size**2 * width
    if share is None:
        return embedding + (local + around) * layer(all_tokens)
    before = min(local, layers_before(local))
    left = tokens_left(most if tiles is None else tiles, most, patches, all_tokens, share)
    return embedding + before * layer(all_tokens) + (local + around - before) * layer(left)
