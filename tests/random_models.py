"""Small random Mllama models and inputs, made from a seed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
import threading
from typing import Any

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE

TILES = 4
ASPECT_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
TILE_COUNTS = [rows * columns for rows, columns in ASPECT_RATIOS]
VOCABULARY = 32
#: The image token's id equals the vocabulary's size, as in Llama-3.2-Vision.
IMAGE_TOKEN = VOCABULARY
PAD = 0


def random_config(
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 5,
    cross_layers: tuple[int, ...] = (1, 3),
    image_size: int = 8,
    attention: str = "sdpa",
    width: int = 32,
    vision_width: int = 16,
) -> MllamaConfig:
    """The configuration of a tiny Mllama; `image_size` 8 gives 5 visual tokens a tile, 16 gives 17."""
    config = MllamaConfig(
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 2 * vision_width,
            "vision_output_dim": 2 * vision_width,
            "image_size": image_size,
            "patch_size": 4,
            "max_num_tiles": TILES,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": ASPECT_RATIOS,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": 2 * width,
            "cross_attention_layers": list(cross_layers),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": 4096,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        image_token_index=IMAGE_TOKEN,
    )
    config._attn_implementation = attention
    return config


def random_model(seed: int = 0, **settings: Any) -> MllamaForConditionalGeneration:
    """A tiny Mllama whose cross-attention matters: gates are open, weights are large enough to make heads choose."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(random_config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.ndim == 1 and parameter.numel() == 1:
                parameter.fill_(0.8)
            elif parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
            elif "embed" in name and parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@dataclasses.dataclass
class Sample:
    """A prompt: text lengths between pictures, and the aspect ratio ids of each picture.

    `parts` holds an int (that many text tokens) or a tuple of aspect ratio ids (that many pictures in a row).
    """

    parts: tuple[Any, ...]

    @property
    def pictures(self) -> list[int]:
        return [ratio for part in self.parts if isinstance(part, tuple) for ratio in part]


def random_inputs(
    model: MllamaForConditionalGeneration, samples: list[Sample], seed: int = 0, pad_rows_see: bool = False
) -> dict[str, torch.Tensor]:
    """Left-padded inputs as `MllamaProcessor` makes them: a picture is read from its token to the next picture's."""
    generator = torch.Generator().manual_seed(seed)
    rows = [_tokens(sample, generator) for sample in samples]
    length = max(len(ids) for ids, _ in rows)
    images = max([len(sample.pictures) for sample in samples] + [1])
    batch = len(samples)
    size = model.config.vision_config.image_size
    input_ids = torch.full((batch, length), PAD)
    attention_mask = torch.zeros(batch, length, dtype=torch.long)
    cross_attention_mask = torch.zeros(batch, length, images, TILES, dtype=torch.long)
    aspect_ratio_ids = torch.zeros(batch, images, dtype=torch.long)
    aspect_ratio_mask = torch.zeros(batch, images, TILES, dtype=torch.long)
    aspect_ratio_mask[..., 0] = 1
    for index, (sample, (ids, spans)) in enumerate(zip(samples, rows, strict=True)):
        offset = length - len(ids)
        input_ids[index, offset:] = torch.tensor(ids)
        attention_mask[index, offset:] = 1
        for picture, (ratio, (start, end)) in enumerate(zip(sample.pictures, spans, strict=True)):
            tiles = TILE_COUNTS[ratio - 1]
            aspect_ratio_ids[index, picture] = ratio
            aspect_ratio_mask[index, picture, :tiles] = 1
            first = 0 if pad_rows_see else offset + start
            cross_attention_mask[index, first : offset + end, picture, :tiles] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(sample.pictures for sample in samples):
        inputs |= {
            "pixel_values": torch.randn(batch, images, TILES, 3, size, size, generator=generator),
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
            "cross_attention_mask": cross_attention_mask,
        }
    return inputs


def _tokens(sample: Sample, generator: torch.Generator) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and for every picture the rows that read it: pictures in a row share the text after the last of them."""
    ids: list[int] = []
    starts: list[tuple[int, int]] = []
    for run, part in enumerate(sample.parts):
        if isinstance(part, tuple):
            for _ in part:
                starts.append((len(ids), run))
                ids.append(IMAGE_TOKEN)
        else:
            ids += torch.randint(3, VOCABULARY, (part,), generator=generator).tolist()
    spans = []
    for start, run in starts:
        later = [other for other, other_run in starts if other_run > run]
        spans.append((start, min(later, default=len(ids))))
    return ids, spans


def generate(model: Any, inputs: dict[str, torch.Tensor], new: int = 8, cache: Any = None, **settings: Any) -> Any:
    """Greedy generation with logits, as a dict output; with a cache of one's own by the name that this transformers gives it."""
    given = {} if cache is None else {CACHE: cache}
    return model.generate(
        **inputs,
        **given,
        max_new_tokens=new,
        **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings},
    )


def trimmed(model: Any, inputs: dict[str, torch.Tensor], config: Any, new: int = 8, **settings: Any) -> Any:
    """`generate` with a trimmed cache of this configuration."""
    return generate(model, inputs, new, cache_implementation="trimmed", cache_config=config, **settings)


#: Two samples of unequal pictures and texts.
PAIR = [Sample((1, (6,), 6)), Sample((2, (1,), 3))]


def prefilled(
    model: Any, samples: list[Sample], ratio: float = 0.2, **settings: Any
) -> tuple[dict[str, torch.Tensor], TrimmedCache]:
    """Inputs, and a trimmed cache that a plain forward has filled with them."""
    inputs = random_inputs(model, samples)
    cache = TrimmedCache(model, {"top_k_ratio": ratio, **settings})
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    return inputs, cache


def largest_difference(first: Any, second: Any) -> float:
    """Largest absolute difference of the logits of two generations."""
    return max(float((a - b).abs().max()) for a, b in zip(first.logits, second.logits, strict=True))


def largest_logit(output: Any) -> float:
    """Largest absolute logit of a generation, at least 1: what rounding is measured by."""
    return max(1.0, *(float(step[step.isfinite()].abs().max()) for step in output.logits))


def check_same_up_to_ties(ours: Any, stock: Any, tolerance: float) -> None:
    """Assert that two greedy generations agree: logits to `tolerance`, tokens wherever stock's choice is clearer than that.

    A sample whose tokens differ in a tie goes on with another text, so it is compared no further.
    """
    steps = len(stock.logits)
    assert len(ours.logits) == steps
    alike = torch.ones(stock.sequences.shape[0], dtype=torch.bool)
    for step, (mine, theirs) in enumerate(zip(ours.logits, stock.logits, strict=True)):
        mine, theirs = mine.float(), theirs.float()
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        off = (mine - theirs).masked_fill(~theirs.isfinite(), 0.0).abs().amax(dim=-1)
        assert float(off[alike].max()) <= tolerance, f"step {step}: logits are off by {off.tolist()}"
        my_token, their_token = (output.sequences[:, step - steps] for output in (ours, stock))
        margin = (theirs.gather(1, their_token[:, None]) - theirs.gather(1, my_token[:, None]))[:, 0]
        assert float(margin[alike].max()) <= 2 * tolerance, (
            f"step {step}: {my_token.tolist()}, not {their_token.tolist()}"
        )
        alike &= my_token == their_token
        if not alike.any():
            return


def at_once(*calls: Any, threads: int = 4) -> None:
    """Make calls in several threads, each in as many, as nearly at once as can be; raise what one of them raises."""
    barrier = threading.Barrier(threads * len(calls))

    def run(call: Any) -> None:
        barrier.wait(timeout=30)
        call()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(threads * len(calls)) as pool:
            for future in [pool.submit(run, call) for call in calls for _ in range(threads)]:
                future.result()
    finally:
        sys.setswitchinterval(interval)
