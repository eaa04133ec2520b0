"""How much memory a generation will take, from a model's configuration alone: no weights are loaded.

Weights and key-value caches are counted exactly. The prefill's working set is an estimate from the tensors that live at the
same time; `benchmarks/memory` compares it with measured peaks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from transformers import MllamaConfig

from trim_plugin.planning.model_sizes import (
    cross_kv_bytes,
    dequantized_scratch,
    image_tokens,
    kv_values,
    self_kv_bytes,
    tile_tokens,
    weight_bytes,
)

#: Scoring never takes more scratch than this, see trim_plugin/attention/scoring.py.
SCORING_SCRATCH = 64 * 2**20
#: (top_k_ratio, kept share of visible tokens): what the paper's rule kept on the small trained model. The union over heads
#: depends on model and picture; give the share itself where it is known.
MEASURED_KEPT = (
    (0.0, 0.0),
    (0.05, 0.153),
    (0.1, 0.246),
    (0.15, 0.361),
    (0.2, 0.480),
    (0.25, 0.611),
    (0.35, 0.814),
    (0.5, 0.965),
    (1.0, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated.

    Args:
        batch: samples.
        images: images a sample.
        tiles: real tiles of each image; the model pads every image to its most tiles.
        readable_images: images that the prompt's last row may read; all of them if they are given in a row, 1 in a chat
            with interleaved images.
        prompt_tokens: text tokens of a prompt.
        new_tokens: text tokens generated.
        tower: whether the vision tower reads the images here; False if their features come ready made.

    Raises:
        ValueError: a number is not positive, or more images can be read than there are.
    """

    batch: int = 1
    images: int = 1
    tiles: int = 4
    readable_images: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 128
    tower: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "tower" and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}.")
        if self.readable_images is not None and self.readable_images > self.images:
            raise ValueError(f"readable_images must be at most images ({self.images}), got {self.readable_images}.")

    @property
    def text_tokens(self) -> int:
        """Text tokens in the self-attention cache when the last token has been chosen."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one way to generate.

    Args:
        name: "stock", "exact" or "trimmed".
        weights: bytes by part of the model.
        cross_kv: bytes of cross-attention keys and values while decoding.
        self_kv: bytes of self-attention keys and values at the end.
        working: estimated bytes that the prefill needs at its peak beyond weights and the caches above.
        kept_tokens: visual tokens that a sample's cache holds.
    """

    name: str
    weights: dict[str, int]
    cross_kv: int
    self_kv: int
    working: int
    kept_tokens: int

    @property
    def peak(self) -> int:
        """Estimated bytes at the peak."""
        return sum(self.weights.values()) + self.cross_kv + self.self_kv + self.working

    def as_dict(self) -> dict[str, Any]:
        """For JSON, sums included."""
        return dataclasses.asdict(self) | {"weights_total": sum(self.weights.values()), "peak": self.peak}


def expected_kept_share(top_k_ratio: float) -> float:
    """The share of visible tokens that the paper's rule is expected to keep, interpolated between measured points.

    Example:
        >>> expected_kept_share(1.0), round(expected_kept_share(0.2), 3)
        (1.0, 0.48)
    """
    for (low, below), (high, above) in itertools.pairwise(MEASURED_KEPT):
        if low <= top_k_ratio <= high:
            return below + (above - below) * (top_k_ratio - low) / (high - low)
    raise ValueError(f"top_k_ratio must be a number in (0, 1], got {top_k_ratio!r}.")


def plan(
    config: MllamaConfig,
    job: Job,
    *,
    weights: str = "bfloat16",
    top_k_ratio: float = 0.25,
    kept_share: float | None = None,
    kv: str | None = None,
) -> list[Plan]:
    """Memory of stock, exact and trimmed generation.

    Args:
        config: the model's configuration.
        job: what is generated.
        weights: format of the weights, see `weight_bytes`.
        top_k_ratio: of the trimmed way.
        kept_share: share of visible tokens that the trimmed way keeps; `expected_kept_share(top_k_ratio)` if None.
        kv: cache format of the exact and trimmed way, see `cross_kv_bytes`.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> from trim_plugin.planning.model_sizes import built_in_config
        >>> stock, exact, trimmed = plan(built_in_config("11b"), Job(tiles=1))
        >>> stock.cross_kv // exact.cross_kv, trimmed.kept_tokens
        (4, 979)
    """
    most = int(config.vision_config.max_num_tiles)
    if job.tiles > most:
        raise ValueError(f"tiles must be at most {most}, the model's most, got {job.tiles}.")
    share = expected_kept_share(top_k_ratio) if kept_share is None else kept_share
    if not 0.0 < share <= 1.0:
        raise ValueError(f"kept_share must be a number in (0, 1], got {kept_share!r}.")
    element = 4 if weights == "float32" else 2
    size = weight_bytes(config, weights)
    readable = (job.readable_images or job.images) * job.tiles * tile_tokens(config)
    total = job.images * image_tokens(config)
    ways = []
    for name, kept in (("stock", total), ("exact", readable), ("trimmed", math.ceil(share * readable))):
        cross = cross_kv_bytes(config, job.batch, kept, None if name == "stock" else kv, element)
        ways.append(
            Plan(
                name,
                size,
                cross,
                self_kv_bytes(config, job.batch, job.text_tokens, element),
                _working_set(config, job, name, kept, cross, element) + dequantized_scratch(config, weights),
                kept,
            )
        )
    return ways


@dataclasses.dataclass(frozen=True)
class Fit:
    """What fits into a memory.

    Args:
        batch: largest batch of one `generate`, whose prefill (vision tower included) runs for all samples at once; 0 if not even
            one sample fits.
        side_by_side: conversations of one sample, each with a cache of its own, that can be held while they are
            prefilled one after another.
    """

    batch: int
    side_by_side: int


def largest_fit(config: MllamaConfig, job: Job, memory: int, **settings: Any) -> dict[str, Fit]:
    """What fits into `memory` bytes for every way to generate.

    Args:
        config: the model's configuration.
        job: what is generated; its batch does not matter.
        memory: bytes.
        settings: as for `plan`.

    Example:
        >>> from trim_plugin.planning.model_sizes import built_in_config
        >>> fits = largest_fit(built_in_config("11b"), Job(tiles=1), 40 * 2**30)
        >>> fits["stock"].side_by_side < fits["exact"].side_by_side < fits["trimmed"].side_by_side
        True
    """
    found = {}
    for way, one in enumerate(plan(config, dataclasses.replace(job, batch=1), **settings)):
        held = one.cross_kv + one.self_kv
        free = memory - sum(one.weights.values()) - one.working
        found[one.name] = Fit(_largest_batch(config, job, memory, way, settings), max(0, free // held))
    return found


def _largest_batch(config: MllamaConfig, job: Job, memory: int, way: int, settings: dict[str, Any]) -> int:
    def fits(batch: int) -> bool:
        return plan(config, dataclasses.replace(job, batch=batch), **settings)[way].peak <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _working_set(config: MllamaConfig, job: Job, way: str, kept: int, cross: int, element: int) -> int:
    """Peak of the prefill beyond weights, cross KV and self KV: the larger of the vision tower's and the text model's."""
    text, total = config.text_config, job.batch * job.images * image_tokens(config)
    rows = job.batch * job.prompt_tokens
    caches = cross + self_kv_bytes(config, job.batch, job.text_tokens, element)
    states = total * text.hidden_size * element
    layer = cross_kv_bytes(config, job.batch, job.images * image_tokens(config), None, element) // len(
        text.cross_attention_layers
    )
    # int64 as it comes, float32 while it is inverted, then the model's dtype.
    mask = rows * job.images * image_tokens(config) * element
    # With several rows and a mask, sdpa attention reads keys and values that are repeated for every head.
    repeated = 2 * states if text.num_key_value_heads < text.num_attention_heads else 0
    attention = max(3 * rows * text.intermediate_size * element, _projection_scratch(config, total, element), repeated)
    in_text = states + mask + attention + (layer if way != "stock" else 0)
    if way == "trimmed":
        in_text += job.batch * kept * text.hidden_size * element
        logits = 2 * text.num_attention_heads * job.prompt_tokens * job.images * image_tokens(config) * 4
        in_text = max(in_text, states + mask + layer + min(SCORING_SCRATCH, logits))
    making_mask = states + rows * job.images * image_tokens(config) * (8 + 4 + element)
    # While the tower runs, no cache exists yet.
    return max(in_text, making_mask - caches, _vision_set(config, job, element) - caches if job.tower else 0)


def _projection_scratch(config: MllamaConfig, tokens: int, element: int) -> int:
    """Keys are normed in float32 (two copies) beside the projected keys of one layer."""
    return tokens * kv_values(config) * (8 + element)


def _vision_set(config: MllamaConfig, job: Job, element: int) -> int:
    vision = config.vision_config
    padded = -(-tile_tokens(config) // 8) * 8 * vision.max_num_tiles
    images = job.batch * job.images
    tokens = images * padded
    pixels = images * vision.max_num_tiles * vision.num_channels * vision.image_size**2 * 4
    mask = 2 * images * padded**2 * element
    outputs = (vision.num_hidden_layers + 1) * tokens * vision.hidden_size * element
    inner = tokens * (2 * vision.intermediate_size + 2 * vision.hidden_size) * element
    final = 2 * tokens * vision.vision_output_dim * element + tokens * config.text_config.hidden_size * element
    return int(pixels + mask + outputs + max(inner, final))
