"""What a forward needs beyond weights and caches: the tensors that live at the same time, by their shapes.

Estimates, in the order of transformers' `MllamaVisionModel.forward` and `MllamaTextCrossAttention.forward`, for sdpa attention.
What kernels take for themselves is not in it; `benchmarks/memory` compares the sums with measured peaks.
"""

from __future__ import annotations

from trim_plugin.arithmetic import FEATURES, layers_before, picture_tokens, tile_tokens, tokens_left
from trim_plugin.planning.configuration import Configuration
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import kv_values

#: Scoring and merging never take more scratch than this each, see `selection.scoring` and `selection.merging`.
SCRATCH = 64 * 2**20


def pixels(config: Configuration, images: int) -> int:
    """Bytes of the processor's `pixel_values`, float32, padding tiles included.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> pixels(built_in_config("11b"), 1)
        15052800
    """
    vision = config.vision_config
    return int(images * vision.max_num_tiles * vision.num_channels * vision.image_size**2 * 4)


def tower(config: Configuration, images: int, element: int, tiles: int = 4, share: float | None = None) -> int:
    """Bytes that the vision tower needs at its peak for so many images at once, its output included.

    The real tiles of an image matter only with a `share`, which is `TrimConfig.tower_share`; None is an untouched tower.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> untouched, four, one = (tower(built_in_config("11b"), 1, 2, *more) for more in ((), (4, 0.5), (1, 0.5)))
        >>> round(untouched / 10**6), one < four < 0.85 * untouched
        (939, True)
    """
    vision = config.vision_config
    local, around = vision.num_hidden_layers, vision.num_global_layers
    # Every tile is padded to a multiple of 8 patches.
    each = vision.max_num_tiles * (-(-tile_tokens(vision) // 8) * 8)
    tokens = images * each
    states = tokens * vision.hidden_size * element
    mask = tokens * each * element
    # States of some layers are gathered, freed of padding, and joined.
    joined = 2 * tokens * vision.vision_output_dim * element

    def mlp(rows: int) -> int:
        return (3 * vision.hidden_size + 2 * vision.intermediate_size) * rows * element

    making_mask = 2 * mask + 3 * states
    # The states of every layer stay until the end.
    if share is None:
        return max(making_mask, mask + (local + around) * states + max(mlp(tokens), joined))
    whole = min(layers_before(local), local)
    left = images * tokens_left(tiles, vision.max_num_tiles, tile_tokens(vision), each, share)
    few = left * vision.hidden_size * element
    # What is read of layers behind the merging is spread to all patches, and so is the last layer's.
    spread = sum(index % local >= whole for index in vision.intermediate_layers_indices) + 1
    choosing = states + SCRATCH + tokens * min(FEATURES, vision.hidden_size) * 4
    few_mask = left * (left // images) * element
    captured = whole * states + (local - whole + around) * few + spread * states
    return max(
        making_mask,
        mask + whole * states + max(mlp(tokens), choosing),
        mask + few_mask + captured + max(mlp(left), joined),
    )


def visual_state_bytes(config: Configuration, images: int, element: int) -> int:
    """Bytes of what the text model reads of images."""
    return images * picture_tokens(config.vision_config) * config.text_config.hidden_size * element


def text(config: Configuration, job: Job, samples: int, kept: int | None, element: int) -> int:
    """Bytes that the text model needs at its peak to read the prompts of `samples` samples, their visual states included.

    Later layers get `kept` visual tokens of a sample; None if nothing is chosen (stock, exact).
    """
    own, visual = config.text_config, samples * job.images * picture_tokens(config.vision_config)
    rows = samples * job.prompt_tokens
    states = visual * own.hidden_size * element
    keys = visual * kv_values(config) * element
    mask = rows * job.images * picture_tokens(config.vision_config)
    # int64 as it comes, float32 while it is inverted, then the model's dtype.
    making_mask = states + mask * (8 + 4 + element)
    # Keys are normed in float32. With several rows and a mask, keys and values are repeated for every head.
    norm = visual * kv_values(config) * 8 + keys
    repeated = 2 * states if own.num_key_value_heads < own.num_attention_heads else 0
    attention = max(norm, repeated, 3 * rows * own.intermediate_size * element)
    choosing = 0
    if kept is not None:
        scores = 2 * own.num_attention_heads * mask * 4
        choosing = min(SCRATCH, scores + 4 * keys) + samples * kept * own.hidden_size * element
    return max(making_mask, states + mask * element + 2 * keys + max(attention, choosing))


def logits(config: Configuration, sequences: int, element: int) -> int:
    """Bytes of the next token's scores: as the model yields them, in float32, and the copy that `generate` works on."""
    return int(sequences * config.text_config.vocab_size * (element + 4 + 4))


def layer_kv(config: Configuration, tokens: int, element: int) -> int:
    """Bytes of one layer's keys and values, for so many tokens of all sequences together.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> layer_kv(built_in_config("11b"), 6404, 2)
        26230784
    """
    return 2 * tokens * kv_values(config) * element
