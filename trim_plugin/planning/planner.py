"""How much memory a generation will take, from a model's configuration alone: no weights are loaded.

Weights and key-value caches are counted exactly. Working sets are estimates from the tensors that live at the same time;
`benchmarks/memory` compares the peaks with measured ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from transformers import MllamaConfig

from trim_plugin.config import DEFAULT_TOP_K_RATIO, TrimConfig
from trim_plugin.forward.tower import pictures_at_a_time
from trim_plugin.generation.micro_batches import TOWER_CALLS
from trim_plugin.planning import working_set
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import (
    cross_kv_bytes,
    dequantized_scratch,
    element_size,
    image_tokens,
    self_kv_bytes,
    tile_tokens,
    weight_bytes,
)
from trim_plugin.selection.processors import checked_share

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


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to generate.

    Args:
        name: what it is called in tables: "stock", "exact", "trimmed", or with what tells it from others.
        kept_share: share of the readable visual tokens that is held; None is stock, which holds everything and reads the whole
            batch at once, copies included.
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
        if self.kept_share is not None and not 0.0 < self.kept_share <= 1.0:
            raise ValueError(f"kept_share must be a number in (0, 1], got {self.kept_share!r}.")
        object.__setattr__(self, "tower_share", checked_share(self.tower_share))

    @property
    def stock(self) -> bool:
        """Whether this is transformers alone."""
        return self.kept_share is None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one way to generate.

    Args:
        way: the way.
        weights: bytes by part of the model.
        cross_kv: bytes of cross-attention keys and values while decoding.
        prompt_kv: bytes of self-attention keys and values when the prompt has been read.
        self_kv: the same when the last token has been chosen.
        prefill_kv: bytes of all keys and values that exist at the peak of reading the prompts.
        prefill_set: estimated bytes that reading the prompts needs at that moment beyond weights and caches.
        decode_set: estimated bytes that a decoding step needs beyond weights and caches.
        reserve: bytes left free.
        kept_tokens: visual tokens that a sample's cache holds.
        at_a_time: images that the tower reads at a time, and samples that the text model reads at a time.
    """

    way: Way
    weights: dict[str, int]
    cross_kv: int
    prompt_kv: int
    self_kv: int
    prefill_kv: int
    prefill_set: int
    decode_set: int
    reserve: int
    kept_tokens: int
    at_a_time: tuple[int, int]

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
        sums = {
            name: getattr(self, name) for name in ("weights_total", "prefill_peak", "decode_peak", "peak", "needed")
        }
        return own.pop("way") | own | sums


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


def ways(
    top_k_ratios: Sequence[float] = (DEFAULT_TOP_K_RATIO,),
    kept_shares: Sequence[float] = (),
    kv_quantization: str | None = None,
    prefill_pictures: int | None = None,
    tower_share: float | None = None,
) -> list[Way]:
    """Stock, exact, and trimmed for every ratio and share; a `tower_share` is for trimmed alone.

    Example:
        >>> [way.name for way in ways((0.25,))], [way.name for way in ways((0.25, 0.1))][2:]
        (['stock', 'exact', 'trimmed'], ['trimmed 0.25', 'trimmed 0.1'])
    """
    shares: list[tuple[float, float | None, str]] = [
        (expected_kept_share(ratio), ratio, f"{ratio:g}") for ratio in top_k_ratios
    ]
    shares += [(share, None, f"{100 * share:g} %") for share in kept_shares]
    found = [Way("stock"), Way("exact", 1.0, 1.0, kv_quantization, prefill_pictures)]
    for share, ratio, word in shares:
        name = "trimmed" if len(shares) == 1 else f"trimmed {word}"
        found.append(Way(name, share, ratio, kv_quantization, prefill_pictures, tower_share))
    return found


def plan(config: MllamaConfig, job: Job, way: Way, *, weights: str = "bf16", reserve: int = RESERVE) -> Plan:
    """Memory of one way to generate.

    Args:
        config: the model's configuration.
        job: what is generated.
        way: how.
        weights: format of the weights, see `weight_bytes`.
        reserve: bytes to be left free.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> from trim_plugin.planning.model_sizes import built_in_config
        >>> stock, exact, trimmed = (plan(built_in_config("11b"), Job(tiles=1), way) for way in ways())
        >>> stock.cross_kv // exact.cross_kv, trimmed.kept_tokens
        (4, 578)
    """
    most = int(config.vision_config.max_num_tiles)
    if job.tiles > most:
        raise ValueError(f"tiles must be at most {most}, the model's most, got {job.tiles}.")
    element = element_size(weights)
    readable = (job.readable_images or job.images) * job.tiles * tile_tokens(config)
    share = way.kept_share
    kept = job.images * image_tokens(config) if share is None else math.ceil(share * readable)
    held = job.sequences if way.stock else job.batch
    cross = cross_kv_bytes(config, held, kept, way.kv_quantization, element)
    prompt = self_kv_bytes(config, job.sequences, job.prompt_tokens, element)
    at_a_time = pieces(config, job, way)
    beside = dequantized_scratch(config, weights)
    if job.tower and job.pixels_on_device:
        beside += working_set.pixels(config, held * job.images)
    prefill_kv, prefill_set = _prefill(config, job, way, kept, cross, at_a_time, element)
    return Plan(
        way=way,
        weights=weight_bytes(config, weights),
        cross_kv=cross,
        prompt_kv=prompt,
        self_kv=self_kv_bytes(config, job.sequences, job.text_tokens, element),
        prefill_kv=prefill_kv,
        prefill_set=prefill_set + beside,
        decode_set=_decode_set(config, job, way, kept, element) + beside,
        reserve=reserve,
        kept_tokens=kept,
        at_a_time=at_a_time,
    )


def pieces(config: MllamaConfig, job: Job, way: Way) -> tuple[int, int]:
    """Images that the tower reads at a time, and samples that the text model reads at a time."""
    if way.stock:
        return job.sequences * job.images, job.sequences
    images = pictures_at_a_time(TrimConfig(prefill_pictures=way.prefill_pictures), config.vision_config)
    for_text = images * TOWER_CALLS if way.prefill_pictures is None else images
    samples = min(job.batch, max(1, for_text // job.images))
    return min(images, samples * job.images), samples


def _prefill(
    config: MllamaConfig, job: Job, way: Way, kept: int, cross: int, at_a_time: tuple[int, int], element: int
) -> tuple[int, int]:
    """Caches, and what is needed beyond them, at the larger moment of three: the tower at work on the last piece, the text model
    at work on it, all pieces being joined."""
    images, samples = at_a_time
    prompts = self_kv_bytes(config, job.sequences, job.prompt_tokens, element)
    # Stock reads copies as if they were samples, pieces read a sample once and repeat its text in the end.
    caches = cross + (prompts if way.stock else prompts // job.copies)
    last = images if way.stock else samples * job.images
    chosen = kept if way.kept_share is not None and way.kept_share < 1.0 else None
    moments = [(caches, working_set.text(config, job, samples, chosen, element))]
    if job.tower:
        earlier = 0 if way.stock else caches * (job.batch - samples) // job.batch
        # While the tower reads some images of a piece, the states of all of them are gathered.
        gathered = 0 if images >= last else working_set.visual_states(config, last, element)
        moments.append((earlier, gathered + working_set.tower(config, images, element, job.tiles, way.tower_share)))
    if not way.stock and (samples < job.batch or job.copies > 1):
        one_cross = cross // len(config.text_config.cross_attention_layers)
        one_self = working_set.layer_kv(config, job.sequences, job.prompt_tokens, element)
        moments.append((cross + prompts, max(one_cross, one_self)))
    return max(moments, key=sum)


def _decode_set(config: MllamaConfig, job: Job, way: Way, kept: int, element: int) -> int:
    """The last step: what one layer needs, or the next token's scores."""
    growing = working_set.layer_kv(config, job.sequences, job.text_tokens, element)
    reading = 0
    if way.kv_quantization is not None:
        reading += working_set.layer_kv(config, job.batch, kept, element)
    if job.copies > 1 and job.batch > 1 and not way.stock:  # every sequence's own, for one layer at a time
        reading += working_set.layer_kv(config, job.sequences, kept, element)
    return max(growing, reading, working_set.logits(config, job.sequences, element))
