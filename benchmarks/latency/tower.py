"""The vision tower on fewer patches: ``python -m benchmarks latency --tower``.

A tower of the 11B model's widths and picture size with fewer layers ("11b-eighth": 4 local, 1 global) and random weights, with
and without `tower_share`, for pictures of one tile and of four, ways in turns in one process. "untouched again" is the
untouched tower against itself: its ratio is the noise. What choosing and merging take is timed within the calls, and stands
apart since it does not grow with the layers. Peaks are taken in a process of their own for every way. The arithmetic is counted
for this tower and for the whole 11B one.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from rich.progress import Progress
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

import trim_plugin.forward.tower_merging
from benchmarks.common.arithmetic import tower_operations
from benchmarks.common.device import peak, start_peak, synchronize
from benchmarks.common.intervals import median_interval, spread
from benchmarks.common.models import shape_config
from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import seed_everything
from trim_plugin.forward.tower_merging import merging_in_tower
from trim_plugin.planning.configuration import built_in_config

#: Way → `TrimConfig.tower_share`.
WAYS: dict[str, float | None] = {
    "untouched": None,
    "untouched again": None,
    "share 0.75": 0.75,
    "share 0.6": 0.6,
    "share 0.5": 0.5,
}
QUICK_WAYS = ("untouched", "untouched again", "share 0.5")
TILES = (1, 4)
SHAPE = "11b-eighth"


def load_tower(shape: str, dtype: torch.dtype, device: str) -> Any:
    """The vision tower of a shape with random weights."""
    seed_everything()
    with torch.device(device):
        tower = MllamaVisionModel._from_config(shape_config(shape).vision_config, dtype=dtype)
    return tower.eval()


def pictures(tower: Any, tiles: int) -> dict[str, torch.Tensor]:
    """One picture of noise; padding tiles are zeros, as the processor makes them."""
    vision, device = tower.config, tower.device
    size, most = vision.image_size, vision.max_num_tiles
    pixels = torch.randn(1, 1, most, vision.num_channels, size, size, dtype=tower.dtype, device=device)
    pixels[:, :, tiles:] = 0
    ratio = [rows * columns for rows, columns in vision.supported_aspect_ratios].index(tiles) + 1
    mask = torch.zeros(1, 1, most, dtype=torch.long, device=device)
    mask[..., :tiles] = 1
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[ratio]], device=device),
        "aspect_ratio_mask": mask,
    }


@contextlib.contextmanager
def choosing_timed(device: str, found: list[float]) -> Iterator[None]:
    """Note the seconds that choosing and merging take within."""
    merge = trim_plugin.forward.tower_merging.TowerCall.reduce

    def timed(*given: Any) -> Any:
        synchronize(device)
        start = time.perf_counter()
        result = merge(*given)
        synchronize(device)
        found.append(time.perf_counter() - start)
        return result

    with mock.patch.object(trim_plugin.forward.tower_merging.TowerCall, "reduce", timed):
        yield


def call(tower: Any, inputs: dict[str, torch.Tensor], share: float | None) -> None:
    """One picture through the tower."""
    with torch.no_grad(), merging_in_tower(tower, share, inputs["aspect_ratio_mask"]):
        tower(**inputs)


def measure(tower: Any, tiles: int, turns: int, ways: tuple[str, ...], device: str) -> list[dict[str, Any]]:
    """All ways in turns, for one picture of so many tiles."""
    inputs = pictures(tower, tiles)
    times: dict[str, list[float]] = {way: [] for way in ways}
    choosing: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways[1:]:
        call(tower, inputs, WAYS[way])  # the first call pays for allocations and kernels
    for turn in range(turns):
        for way in ways if turn % 2 == 0 else tuple(reversed(ways)):
            found: list[float] = []
            synchronize(device)
            start = time.perf_counter()
            with choosing_timed(device, found):
                call(tower, inputs, WAYS[way])
            synchronize(device)
            times[way].append(time.perf_counter() - start)
            choosing[way].append(sum(found))
    untouched, whole = tower_operations(tower.config), built_in_config("11b").vision_config
    rows = []
    for way in ways:
        ratios = [other / own for own, other in zip(times[way], times[ways[0]], strict=True)]
        rows.append(
            {
                "tiles": tiles,
                "way": way,
                "turns": turns,
                "seconds": spread(times[way]),
                "choosing_seconds": spread(choosing[way]),
                "times_less": spread(ratios),
                "interval": median_interval(ratios),
                "by_arithmetic": untouched / tower_operations(tower.config, tiles, WAYS[way]),
                "by_arithmetic_11b": tower_operations(whole) / tower_operations(whole, tiles, WAYS[way]),
            }
        )
    return rows


def peak_of(shape: str, dtype: str, way: str, tiles: int, device: str) -> int:
    """Bytes that one call takes at its peak beyond what is held before."""
    tower = load_tower(shape, getattr(torch, dtype), device)
    inputs = pictures(tower, tiles)
    before = start_peak(device)
    call(tower, inputs, WAYS[way])
    synchronize(device)
    return max(0, peak(device) - before)


def peak_in_its_own_process(*given: Any) -> int:
    """`peak_of` where nothing was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(peak_of, given))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    dtype, device = arguments.tower_dtype, arguments.device
    ways, all_tiles = (QUICK_WAYS, TILES[:1]) if arguments.quick else (tuple(WAYS), TILES)
    shape = arguments.tower_shape
    rows: list[dict[str, Any]] = []
    vision = shape_config(shape).vision_config
    result = {
        "environment": environment(device),
        "quick": arguments.quick,
        "dtype": dtype,
        "shape": shape,
        "vision_layers": [vision.num_hidden_layers, vision.num_global_layers],
        "rows": rows,
    }
    with Progress() as bar:
        task = bar.add_task("tower", total=len(all_tiles) * (1 + len(ways)))
        peaks: dict[tuple[int, str], int] = {}
        for tiles in all_tiles:
            for way in ways:
                peaks[tiles, way] = peak_in_its_own_process(shape, dtype, way, tiles, device)
                bar.advance(task)
        tower = load_tower(shape, getattr(torch, dtype), device)
        for tiles in all_tiles:
            for row in measure(tower, tiles, 1 if arguments.quick else arguments.tower_turns, ways, device):
                held = peaks[tiles, row["way"]]
                rows.append(row | {"peak": held, "peak_share": held / max(1, peaks[tiles, ways[0]])})
            write_result("tower", result, arguments.out)  # a run that is cut off leaves what it has
            bar.advance(task)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--tower", action="store_true", help="latency: the vision tower on fewer patches instead")
    parser.add_argument(
        "--tower-dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="latency --tower: what it computes in",
    )
    parser.add_argument("--tower-turns", type=int, default=3, metavar="N", help="latency --tower: turns of every way")
    parser.add_argument("--tower-shape", default=SHAPE, help=argparse.SUPPRESS)
