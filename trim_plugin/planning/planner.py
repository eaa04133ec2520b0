"""How much memory a generation will take, from a model's configuration alone: no weights are loaded.

Weights and key-value caches are counted exactly, for as many kept tokens as are given or expected. Working sets are estimates
from the tensors that live at the same time; `benchmarks/memory` compares the peaks with measured ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trim_plugin.arithmetic import (
    CLASS_PADDING,
    checked_share,
    classify,
    picture_tokens,
    pictures_at_a_time,
    pictures_read_together,
    share,
    tile_tokens,
)
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.planning import working_set
from trim_plugin.planning.configuration import Configuration
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import (
    cross_kv_bytes,
    dequantized_scratch,
    element_size,
    self_kv_bytes,
    weight_bytes,
)

#: Left free by default: a CUDA context takes about half of it, the rest is for blocks that the allocator cannot use again.
RESERVE = 2**30
#: (top_k_ratio, kept share of visible tokens): what the paper's rule kept on the small trained model, merged or not. The union
#: over heads depends on model and picture; give the share itself where it is known.
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
#: Numbers of a plan that are upper bounds where samples have different tiles: every micro-batch counts as one of the fullest.
FULLEST = ("prefill_kv", "prefill_set", "prefill_peak", "needed")
#: Numbers that are upper bounds where samples keep different numbers of tokens, of which only the mean is known.
UPPER_BOUNDS = ("cross_kv", "held_tokens", "decode_set", "decode_peak", *FULLEST)


@dataclasses.dataclass(frozen=True)
class PlannedVariant:
    """A setting that is planned for.

    Args:
        name: what it is called in tables: "stock", "exact", "trimmed", or with what tells it from others.
        kept_share: share of the readable visual tokens that is held; None is stock, which holds everything and reads the whole
            batch at once, as often as it is expanded.
        top_k_ratio: where the share comes from, if from a ratio.
        kv_quantization: "int8" or "nf4" for the cross-attention cache; None for the model's dtype.
        prefill_pictures: as in `TrimConfig`; None is its default.
        tower_share: as in `TrimConfig`; None leaves the vision tower untouched.

    Raises:
        ValueError: a share outside (0, 1].
    """

    name: str
    kept_share: float | None = None
    top_k_ratio: float | None = None
    kv_quantization: str | None = None
    prefill_pictures: int | None = None
    tower_share: float | None = None

    def __post_init__(self) -> None:
        if self.kept_share is not None:
            share("kept_share", self.kept_share)
        object.__setattr__(self, "tower_share", checked_share(self.tower_share))

    @property
    def stock(self) -> bool:
        """Whether this is transformers alone."""
        return self.kept_share is None

    @property
    def forecast(self) -> bool:
        """Whether the share is forecast from a ratio: single samples will keep more or less."""
        return self.top_k_ratio is not None and self.kept_share is not None and self.kept_share < 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one variant.

    Args:
        variant: the variant.
        weights: bytes by part of the model.
        cross_kv: bytes of cross-attention keys and values while decoding.
        prompt_kv: bytes of self-attention keys and values when the prompt has been read.
        self_kv: the same when the last token has been chosen.
        prefill_kv: bytes of all keys and values that exist at the peak of reading the prompts.
        prefill_set: estimated bytes that reading the prompts needs at that moment beyond weights and caches.
        decode_set: estimated bytes that a decoding step needs beyond weights and caches.
        reserve: bytes left free.
        kept_tokens: visual tokens that the fullest sample keeps.
        held_tokens: visual tokens that the cache holds for the whole batch, padding within width classes included.
        at_a_time: images that the tower reads at a time, and samples that the text model reads at a time.
        upper_bounds: which of these numbers are the most that it can be. A micro-batch is counted as if it held the fullest
            samples, which not every one does. What a ratio keeps varies from sample to sample: the mean is forecast, and as much
            padding between samples is counted as a width class may have.
    """

    variant: PlannedVariant
    weights: dict[str, int]
    cross_kv: int
    prompt_kv: int
    self_kv: int
    prefill_kv: int
    prefill_set: int
    decode_set: int
    reserve: int
    kept_tokens: int
    held_tokens: int
    at_a_time: tuple[int, int]
    upper_bounds: tuple[str, ...] = ()

    @property
    def weights_total(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def prefill_peak(self) -> int:
        """Estimated bytes in use at the prefill's peak, without the reserve."""
        return self.weights_total + self.prefill_kv + self.prefill_set

    @property
    def decode_peak(self) -> int:
        """Estimated bytes in use at decoding's peak, the last token's step, without the reserve."""
        return self.weights_total + self.cross_kv + self.self_kv + self.decode_set

    @property
    def peak(self) -> int:
        """Estimated bytes in use at the peak, without the reserve."""
        return max(self.prefill_peak, self.decode_peak)

    @property
    def needed(self) -> int:
        """The peak and the reserve: what the device must have."""
        return self.peak + self.reserve

    def as_dict(self) -> dict[str, Any]:
        """For JSON, sums included."""
        own = dataclasses.asdict(self)
        sums = ("weights_total", "prefill_peak", "decode_peak", "peak", "needed")
        return own.pop("variant") | own | {name: getattr(self, name) for name in sums}


def expected_kept_share(top_k_ratio: float) -> float:
    """The share of visible tokens that the paper's rule is expected to keep, interpolated between measured points.

    Example:
        >>> expected_kept_share(1.0), round(expected_kept_share(0.2), 3)
        (1.0, 0.48)
    """
    for (low, below), (high, above) in itertools.pairwise(MEASURED_KEPT):
        if low <= top_k_ratio <= high and top_k_ratio > 0:
            return below + (above - below) * (top_k_ratio - low) / (high - low)
    raise ValueError(f"top_k_ratio must be a number in (0, 1], got {top_k_ratio!r}.")


def variants(
    top_k_ratios: Sequence[float] = (),
    kept_shares: Sequence[float] = (),
    kv_quantization: str | None = None,
    prefill_pictures: int | None = None,
    tower_share: float | None = None,
) -> list[PlannedVariant]:
    """Stock, exact, and a trimmed variant for every ratio and share, or for the default rule's share where none is given.

    `tower_share` is that of the trimmed variants.

    Example:
        >>> [variant.name for variant in variants((0.25,))], [variant.name for variant in variants((0.25, 0.1))][2:]
        (['stock', 'exact', 'trimmed'], ['trimmed 0.25', 'trimmed 0.1'])
    """
    shares: list[tuple[float, float | None, str]] = [
        (expected_kept_share(ratio), ratio, f"{ratio:g}") for ratio in top_k_ratios
    ]
    kept_shares = kept_shares if kept_shares or top_k_ratios else (DEFAULT_KEPT_SHARE,)
    shares += [(kept, None, f"{100 * kept:g} %") for kept in kept_shares]
    found = [PlannedVariant("stock"), PlannedVariant("exact", 1.0, 1.0, kv_quantization, prefill_pictures)]
    for kept, ratio, word in shares:
        name = "trimmed" if len(shares) == 1 else f"trimmed {word}"
        found.append(PlannedVariant(name, kept, ratio, kv_quantization, prefill_pictures, tower_share))
    return found


def plan(
    config: Configuration, job: Job, variant: PlannedVariant, *, weights: str = "bf16", reserve: int = RESERVE
) -> Plan:
    """The memory that a job takes with one variant; the format of the weights is one of `weight_bytes`.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> stock, exact, trimmed = (plan(built_in_config("11b"), Job(tiles=1), variant) for variant in variants())
        >>> stock.cross_kv // exact.cross_kv, trimmed.kept_tokens
        (4, 561)
    """
    most = int(config.vision_config.max_num_tiles)
    if job.most_tiles > most:
        raise ValueError(f"tiles must be at most {most}, the model's most, got {job.most_tiles}.")
    element = element_size(weights)
    kept = samples_by_kept(config, job, variant)
    classes = [(width, samples * (job.expand_size if variant.stock else 1)) for width, samples in width_classes(kept)]
    varies = variant.forecast and job.batch > 1
    if varies:  # more in one sample and less in another, of which at most so much is padding
        classes = [(math.ceil(width / (1 - CLASS_PADDING)), samples) for width, samples in classes]
    held = sum(width * samples for width, samples in classes)
    cross = cross_kv_bytes(config, 1, held, variant.kv_quantization, element)
    prompt = self_kv_bytes(config, job.sequences, job.prompt_tokens, element)
    at_a_time = micro_batch(config, job, variant)
    beside = dequantized_scratch(config, weights)
    if job.tower and job.pixels_on_device:
        beside += working_set.pixels(config, (job.sequences if variant.stock else job.batch) * job.images)
    prefill_kv, prefill_set = _prefill(config, job, variant, max(kept), cross, at_a_time, element)
    bounds = UPPER_BOUNDS if varies else ()
    if not variant.stock and len(job.samples_by_tiles) > 1:
        bounds = tuple(dict.fromkeys((*bounds, *FULLEST)))
    return Plan(
        variant=variant,
        weights=weight_bytes(config, weights),
        cross_kv=cross,
        prompt_kv=prompt,
        self_kv=self_kv_bytes(config, job.sequences, job.text_tokens, element),
        prefill_kv=prefill_kv,
        prefill_set=prefill_set + beside,
        decode_set=_decode_set(config, job, variant, classes, element) + beside,
        reserve=reserve,
        kept_tokens=max(kept),
        held_tokens=held,
        at_a_time=at_a_time,
        upper_bounds=bounds,
    )


def samples_by_kept(config: Configuration, job: Job, variant: PlannedVariant) -> dict[int, int]:
    """How many samples of the batch keep so many visual tokens.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> samples_by_kept(built_in_config("11b"), Job(batch=4, tiles=(1, 1, 1, 4)), PlannedVariant("exact", 1.0))
        {1601: 3, 6404: 1}
    """
    if variant.kept_share is None:
        return {job.images * picture_tokens(config.vision_config): job.batch}
    of_a_tile = (job.readable_images or job.images) * tile_tokens(config.vision_config)
    return {
        math.ceil(variant.kept_share * tiles * of_a_tile): samples for tiles, samples in job.samples_by_tiles.items()
    }


def width_classes(kept: Mapping[int, int]) -> list[tuple[int, int]]:
    """How a cache lays out samples, of which `samples_by_kept` says what they keep: the width of every class, and its samples.

    Example:
        >>> width_classes({1601: 3, 6404: 1}), width_classes({1601: 3, 1700: 1})
        ([(6404, 1), (1601, 3)], [(1700, 4)])
    """
    counts = list(kept)
    found = classify(counts, [1] * len(counts), bucket=0)
    return sorted(((width, sum(kept[counts[own]] for own in members)) for members, width in found), reverse=True)


def micro_batch(config: Configuration, job: Job, variant: PlannedVariant) -> tuple[int, int]:
    """Images that the tower reads at a time, and samples that the text model reads at a time."""
    if variant.stock:
        return job.sequences * job.images, job.sequences
    samples = max(1, pictures_read_together(variant.prefill_pictures, config.vision_config) // job.images)
    samples = min(job.batch, samples)
    return min(pictures_at_a_time(variant.prefill_pictures, config.vision_config), samples * job.images), samples


def _prefill(
    config: Configuration,
    job: Job,
    variant: PlannedVariant,
    kept: int,
    cross: int,
    at_a_time: tuple[int, int],
    element: int,
) -> tuple[int, int]:
    """Caches, and what is needed beyond them, at the larger moment of three: the tower at work on the last micro-batch, the text
    model at work on it, all micro-batches being joined."""
    images, samples = at_a_time
    prompts = self_kv_bytes(config, job.sequences, job.prompt_tokens, element)
    # Stock reads a sample as often as it is expanded; micro-batches read it once and repeat its text in the end.
    caches = cross + (prompts if variant.stock else prompts // job.expand_size)
    last = images if variant.stock else samples * job.images
    chosen = kept if variant.kept_share is not None and variant.kept_share < 1.0 else None
    moments = [(caches, working_set.text(config, job, samples, chosen, element))]
    if job.tower:
        earlier = 0 if variant.stock else caches * (job.batch - samples) // job.batch
        # While the tower reads some images of a micro-batch, the states of all of them are gathered.
        gathered = 0 if images >= last else working_set.visual_state_bytes(config, last, element)
        tower = working_set.tower(config, images, element, job.most_tiles, variant.tower_share)
        moments.append((earlier, gathered + tower))
    if not variant.stock and (samples < job.batch or job.expand_size > 1):
        one_cross = cross // len(config.text_config.cross_attention_layers)
        one_self = working_set.layer_kv(config, job.sequences * job.prompt_tokens, element)
        moments.append((cross + prompts, max(one_cross, one_self)))
    return max(moments, key=sum)


def _decode_set(
    config: Configuration, job: Job, variant: PlannedVariant, classes: Sequence[tuple[int, int]], element: int
) -> int:
    """The last step: what one layer needs, or the next token's scores. Of what is quantized a class at a time is unpacked."""
    growing = working_set.layer_kv(config, job.sequences * job.text_tokens, element)
    reading = 0
    if variant.kv_quantization is not None:
        # Where counts vary, all may fall into one class.
        tokens = [width * samples for width, samples in classes]
        unpacked = sum(tokens) if variant.forecast else max(tokens)
        reading = working_set.layer_kv(config, unpacked, element)
    return max(growing, reading, working_set.logits(config, job.sequences, element))
