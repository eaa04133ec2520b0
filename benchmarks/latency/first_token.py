"""Time to the first token about a page that is known: ``python -m benchmarks latency --first-token``.

`generate` for one token, ways in turns in one process: stock, which runs the vision tower, and pictures encoded before, whole and
at a quarter, from memory and from a file. "stock again" is stock against itself: its ratio is the noise. Pixels lie ready for
stock; for the others making the cache, with its check that this model encoded the pictures, counts. "11b-eighth" has the real
widths and an eighth of the tower's and of the text model's layers, so that the parts keep about the shares that they have in the
11B model; its weights are random. What the 11B model itself would save is not measured but counted: `arithmetic`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from benchmarks.common.arithmetic import tower_operations
from benchmarks.common.device import synchronize
from benchmarks.common.intervals import median_interval, spread
from benchmarks.common.models import DTYPE, load_shape
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import SEED, seed_everything
from trim_plugin import KCenter, Pictures, TrimConfig, TrimmedCache, encode_pictures
from trim_plugin.arithmetic import picture_tokens
from trim_plugin.planning.configuration import built_in_config

SHAPES = ("small", "11b-eighth")
SHARE = 0.25
WAYS = ("stock", "stock again", "encoded whole", "encoded 25 %", "encoded 25 %, from a file")
#: Rows of text that the arithmetic is counted for: a short question, a long one, and one after pages of text.
TEXT_ROWS = (50, 250, 1000)


def page(config: Any) -> tuple[Image.Image, Any]:
    """A picture of noise that fills four tiles, and an image processor for it."""
    side = 2 * config.vision_config.image_size
    pixels = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), dtype=np.uint8)
    tile = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return Image.fromarray(pixels), SimpleNamespace(
        image_processor=MllamaImageProcessorPil(size=tile, max_image_tiles=4)
    )


def measure(shape: str, rounds: int, device: str) -> dict[str, Any]:
    """One shape: all ways in turns."""
    model = load_shape(shape, getattr(torch, DTYPE[shape]), device)
    image, processor = page(model.config)
    inputs = scenario_inputs(model, SCENARIOS["page"], 1)
    seen = processor.image_processor(images=[[image]], return_tensors="pt")
    inputs["pixel_values"] = seen["pixel_values"].to(device, model.dtype)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    encoding, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        encoded = {}
        for name, rule in (("whole", None), ("25 %", KCenter(SHARE))):
            encoding[name], encoded[name] = timed(lambda r=rule: encode_pictures(model, processor, [image], r), device)
            file = Path(folder) / f"{len(sizes)}.safetensors"
            encoded[name].save(file)
            sizes[name] = file.stat().st_size

        def answer(pictures: Pictures) -> torch.Tensor:
            cache = TrimmedCache(model, TrimConfig(top_k_ratio=1.0), pictures=pictures)
            return model.generate(**asked, cache=cache, max_new_tokens=1, do_sample=False)

        def stock() -> torch.Tensor:
            return model.generate(**inputs, max_new_tokens=1, do_sample=False)

        calls: dict[str, Callable[[], torch.Tensor]] = {
            "stock": stock,
            "stock again": stock,
            "encoded whole": lambda: answer(encoded["whole"]),
            "encoded 25 %": lambda: answer(encoded["25 %"]),
            "encoded 25 %, from a file": lambda: answer(Pictures.load(file, device)),
        }
        tokens = {way: calls[way]() for way in WAYS}  # the first call pays for allocations and kernels
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way in WAYS if turn % 2 == 0 else tuple(reversed(WAYS)):
                times[way].append(timed(calls[way], device)[0])
    return {
        "shape": shape,
        "dtype": DTYPE[shape],
        "text_tokens": inputs["input_ids"].shape[1],
        "rounds": rounds,
        "ways": [_row(way, times, tokens) for way in WAYS],
        "encoding_seconds": encoding,
        "file_bytes": sizes,
        "arithmetic": arithmetic(model.config, inputs["input_ids"].shape[1]),
    }


def _row(way: str, times: dict[str, list[float]], tokens: dict[str, torch.Tensor]) -> dict[str, Any]:
    ratios = [stock / own for own, stock in zip(times[way], times["stock"], strict=True)]
    return {
        "way": way,
        "seconds": spread(times[way]),
        "times_less": spread(ratios),
        "interval": median_interval(ratios),
        "same_token": bool(tokens[way].equal(tokens["stock"])),
    }


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def arithmetic(config: Any, text_rows: int) -> dict[str, Any]:
    """Floating-point operations to the first token about one page of four tiles, by part; how many times fewer if it is encoded.

    A multiplication and its addition count as two; norms, softmax and rotary positions are left out.

    Example:
        >>> counted = arithmetic(built_in_config("11b"), 50)
        >>> counted["tower"] > 5 * counted["visual_keys_values"]
        True
    """
    vision, text = config.vision_config, config.text_config
    tokens = picture_tokens(vision)
    tower = tower_operations(vision)
    projector = 2 * tokens * vision.vision_output_dim * text.hidden_size
    wide, grouped = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    crossing = len(text.cross_attention_layers)
    of_itself = text.num_hidden_layers - crossing
    per_row = of_itself * 2 * wide * grouped + text.num_hidden_layers * (
        2 * wide**2 + 3 * wide * text.intermediate_size
    )
    reading = 2 * text_rows * per_row + of_itself * 4 * text_rows**2 * wide + 2 * wide * text.vocab_size

    def of_visual(count: int) -> int:
        return crossing * (2 * count * 2 * wide * grouped + 4 * text_rows * count * wide)

    kept = -(-tokens // 4)
    stock = tower + projector + reading + of_visual(tokens)
    return {
        "text_rows": text_rows,
        "tower": tower,
        "projector": projector,
        "visual_keys_values": of_visual(tokens),
        "text": reading,
        "stock": stock,
        "times_less": {
            "encoded whole": stock / (reading + of_visual(tokens)),
            "encoded 25 %": stock / (reading + of_visual(kept)),
        },
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    result: dict[str, Any] = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "rows": [],
        "arithmetic_11b": [arithmetic(built_in_config("11b"), rows) for rows in TEXT_ROWS],
    }
    with Progress() as bar:
        # One round of the large shape alone takes minutes.
        shapes = SHAPES[:1] if arguments.quick else SHAPES
        task = bar.add_task("time to first token", total=len(shapes))
        for shape in shapes:
            rounds = {"small": (10, 60), "11b-eighth": (2, 9)}[shape][not arguments.quick]
            result["rows"].append(measure(shape, rounds, arguments.device))
            bar.advance(task)
            write_result("first_token", result, arguments.out)
    return result
