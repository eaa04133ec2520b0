"""What a GPU would take, **predicted, not measured**: ``python -m benchmarks gpu --predicted``.

The 11B configuration runs on tensors without values, and every operation is counted: launches, bytes and floating-point
operations. Seconds are launches × 4 µs + bytes ÷ bandwidth + operations ÷ speed, as if nothing overlapped. K-center alone runs on
real numbers, since how many rounds it takes depends on them: on visual states of neighbours that are alike, with noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from transformers import MllamaForConditionalGeneration
from transformers.initialization import no_init_weights

import trim_plugin.forward.turn
import trim_plugin.selection.select
from benchmarks.common.cost import DEVICES, Counts, seconds
from benchmarks.common.decoding import stock_cache
from benchmarks.common.models import transformers_config
from benchmarks.common.results import write_result
from benchmarks.gpu.counted import Counting, OnPaper
from trim_plugin import KCenter, TrimConfig, TrimmedCache
from trim_plugin.arithmetic import PADDING_SHARE, tile_tokens
from trim_plugin.forward.tower_merging import TowerCall, merging_in_tower
from trim_plugin.selection.merging import Merging

ROWS, TILES = 128, 4
#: Name of a way → the share that is kept, and whether k-center chooses.
WAYS: dict[str, tuple[float, bool]] = {
    "kept 0.1": (0.1, False),
    "kept 0.25": (0.25, False),
    "kept 0.5": (0.5, False),
    "k-center 0.1": (0.1, True),
    "k-center 0.35": (0.35, True),
}
TOWER_SHARES = (0.75, 0.6, 0.5)
_CHOOSE = KCenter.choose
_TOWER_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def model_on_paper() -> Any:
    """The 11B model without any values."""
    with no_init_weights(), torch.device("meta"):
        return MllamaForConditionalGeneration._from_config(transformers_config("11b"), dtype=torch.bfloat16).eval()


def page(model: Any) -> dict[str, torch.Tensor]:
    """A picture of four tiles and a question."""
    vision = model.config.vision_config
    with torch.device("meta"):
        return {
            "input_ids": torch.ones(1, ROWS, dtype=torch.long),
            "pixel_values": torch.empty(1, 1, TILES, 3, vision.image_size, vision.image_size, dtype=torch.bfloat16),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, TILES, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, ROWS, 1, TILES, dtype=torch.long),
        }


@functools.lru_cache(maxsize=16)
def choosing(members: int, tokens: int, width: int, share: float) -> Counts:
    """What k-center does among so many tokens of a picture, run on states that are made here."""
    generator = torch.Generator().manual_seed(0)
    side = math.ceil(math.sqrt(tokens / 4))
    coarse = torch.randn(4, 32, side // 4 + 1, side // 4 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
    states = smooth.reshape(1, -1, 32)[:, :tokens] @ torch.randn(32, width, generator=generator)
    states = (states + 2 * torch.randn(states.shape, generator=generator)).bfloat16()
    chosen_among = torch.arange(tokens)[None] < members
    with Counting("cpu") as counting:
        _CHOOSE(KCenter(share), states, chosen_among, sizes=[[members]])
    return counting.found


@contextlib.contextmanager
def _noted(counting: Counting, parts: dict[str, Counts]) -> Iterator[None]:
    """Within this context what trim_plugin adds to a forward is counted apart, and k-center as it was run."""
    turn, merge = trim_plugin.forward.turn, trim_plugin.selection.select.merge_dropped
    running: list[Counts] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = counting.found
            running.append(Counts())
            result = work(*args, **kwargs)
            own, inner = counting.found + before.times(-1), running.pop()
            parts[name] = parts.get(name, Counts()) + own + inner.times(-1)
            if running:
                running[-1] += own
            return result

        return wrapped

    def choose(rule: KCenter, states: torch.Tensor, members: torch.Tensor, **known: Any) -> torch.Tensor:
        tokens = states.shape[1]
        counting.found += choosing(tokens, tokens, states.shape[2], float(rule.kept_share or 1.0))
        return members.clone()

    with (
        mock.patch.object(turn, "layer_queries", noted("scoring", turn.layer_queries)),
        mock.patch.object(turn, "visual_token_scores", noted("scoring", turn.visual_token_scores)),
        mock.patch.object(turn, "select", noted("choosing", turn.select)),
        mock.patch.object(trim_plugin.selection.select, "merge_dropped", noted("merging", merge)),
        mock.patch.object(Merging, "mean", noted("merging", Merging.mean)),
        mock.patch.object(KCenter, "choose", choose),
    ):
        yield


def forwards(model: Any, way: str) -> tuple[Counts, Counts, dict[str, Counts]]:
    """A page's prefill and one decoding step, and of the prefill what trim_plugin adds, by part."""
    tokens = TILES * tile_tokens(model.config.vision_config)
    parts: dict[str, Counts] = {}
    kept, cache = 0, stock_cache(model)
    if way != "stock":
        share, covers = WAYS[way]
        kept = math.ceil(share * tokens)
        config = TrimConfig(processors=(KCenter(share),)) if covers else TrimConfig(top_k_ratio=0.1)
        cache = TrimmedCache(model, config)
    with torch.no_grad(), Counting("meta") as first, OnPaper(first, kept, tokens), _noted(first, parts):
        model(**page(model), cache=cache, use_cache=True, logits_to_keep=1)
    one = torch.ones(1, 1, dtype=torch.long, device="meta")
    seen = torch.ones(1, 1, 1, TILES, dtype=torch.long, device="meta")
    with torch.no_grad(), Counting("meta") as step, OnPaper(step, kept, tokens):
        model(input_ids=one, cross_attention_mask=seen, position_ids=one, cache=cache, use_cache=True)
    return first.found, step.found, parts


def tower(model: Any, tiles: int, share: float | None) -> tuple[Counts, Counts]:
    """The vision tower on one picture; and of it what choosing and merging take."""
    vision, parts = model.config.vision_config, {"tower": Counts()}
    patches, most = tile_tokens(vision), vision.max_num_tiles
    whole = most * -(-patches // 8) * 8
    inputs = {name: tensor for name, tensor in page(model).items() if name in _TOWER_INPUTS}
    reduce, real = TowerCall.reduce, (torch.arange(most) < tiles).view(1, 1, -1)
    with torch.no_grad(), Counting("meta") as counting, OnPaper(counting):

        def choose(rule: KCenter, states: torch.Tensor, members: torch.Tensor, **known: Any) -> torch.Tensor:
            of_patches = rule.kept_share != PADDING_SHARE
            among = tiles * (patches - 1) if of_patches else whole - tiles * patches
            counting.found += choosing(among, whole, states.shape[2], float(rule.kept_share or 1.0))
            return members.clone()

        def reduced(*given: Any) -> Any:
            before = counting.found
            result = reduce(*given)
            parts["tower"] += counting.found + before.times(-1)
            return result

        with (
            mock.patch.object(TowerCall, "reduce", reduced),
            mock.patch.object(KCenter, "choose", choose),
            merging_in_tower(model.model.vision_model, share, real),
        ):
            model.model.vision_model(**inputs)
    return counting.found, parts["tower"]


def predict(ways: tuple[str, ...] = tuple(WAYS), shares: tuple[float, ...] = TOWER_SHARES) -> dict[str, Any]:
    """All rows: what is counted, and the predicted seconds."""
    model = model_on_paper()
    stock_prefill, stock_step, _ = forwards(model, "stock")
    result: dict[str, Any] = {
        "text_rows": ROWS,
        "visual_tokens": TILES * tile_tokens(model.config.vision_config),
        "rows": [_row("prefill", "stock", stock_prefill, stock_prefill), _row("step", "stock", stock_step, stock_step)],
        "tower": [],
    }
    for way in ways:
        prefill, step, parts = forwards(model, way)
        result["rows"] += [_row("prefill", way, prefill, stock_prefill), _row("step", way, step, stock_step)]
        result["rows"] += [_row(part, way, counts, stock_prefill) for part, counts in parts.items()]
        own = sum(parts.values(), Counts())
        result["rows"].append(_row("own work", way, own, stock_prefill))
    for tiles in (1, TILES) if shares else ():
        untouched, _ = tower(model, tiles, None)
        result["tower"].append(_row("tower", "untouched", untouched, untouched) | {"tiles": tiles})
        for share in shares:
            whole, own = tower(model, tiles, share)
            result["tower"].append(_row("tower", f"share {share:g}", whole, untouched) | {"tiles": tiles})
            result["tower"].append(_row("own work", f"share {share:g}", own, untouched) | {"tiles": tiles})
    return result


def _row(part: str, way: str, counts: Counts, stock: Counts) -> dict[str, Any]:
    """One line: of what, which way, what was counted, seconds by device, and their share of stock's."""
    found = {device: seconds(counts, device) for device in DEVICES}
    return {
        "part": part,
        "way": way,
        "launches": counts.launches,
        "bytes": round(counts.bytes),
        "operations": round(counts.operations),
        "seconds": found,
        "share": {device: found[device] / seconds(stock, device) for device in DEVICES},
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, write and return the result."""
    result = predict()
    write_result("predicted", result, arguments.out)
    return result
