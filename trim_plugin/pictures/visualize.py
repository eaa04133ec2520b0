"""Draws which visual tokens of a picture a trimmed cache keeps, their scores, and what each stands for."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from trim_plugin.arithmetic import picture_tokens, tile_side
from trim_plugin.compat import CACHE
from trim_plugin.config import TrimConfig
from trim_plugin.forward.holders import ScoreRecorder, holders
from trim_plugin.forward.hooks import TrimmedCache

#: Pixels of a stripe over a dropped patch, of the overlay's longer side, and how much of the picture shows through: 255 none.
STRIPE, OVERLAY_SIDE, STRIPE_ALPHA = 4, 400, np.uint8(150)
CLASS_TOKEN = "tab:cyan"
#: How much of a region's colour lies over the picture.
TINT = 0.55


class KeptFigure(Figure):
    """A matplotlib figure that a notebook shows where it is a cell's last line; no plotting backend is needed.

    Example:
        >>> KeptFigure(figsize=(1, 1))._repr_html_()[:32]
        '<img style="max-width:100%" src='
    """

    def _repr_html_(self) -> str:
        """The figure as a PNG within HTML."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=80)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img style="max-width:100%" src="data:image/png;base64,{data}">'


@dataclasses.dataclass(frozen=True)
class TileMap:
    """Where the visual tokens of one picture lie.

    Args:
        rows: tiles above one another.
        columns: tiles side by side.
        side: patches along a tile's edge; a tile has one class token and then side² patches.
        first: index of the picture's first visual token.
    """

    rows: int
    columns: int
    side: int
    first: int

    def patches(self, values: np.ndarray) -> np.ndarray:
        """Lay values per visual token (all tokens of the sample) out as an image (rows·side, columns·side)."""
        tiles = self._tiles(values)[:, 1:].reshape(self.rows, self.columns, self.side, self.side)
        return tiles.transpose(0, 2, 1, 3).reshape(self.rows * self.side, self.columns * self.side)

    def class_tokens(self, values: np.ndarray) -> np.ndarray:
        """Values of the tiles' class tokens, (rows, columns)."""
        return self._tiles(values)[:, 0].reshape(self.rows, self.columns)

    def _tiles(self, values: np.ndarray) -> np.ndarray:
        tiles, tokens = self.rows * self.columns, self.side**2 + 1
        return values[self.first : self.first + tiles * tokens].reshape(tiles, tokens)


def visualize(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    config: TrimConfig | Mapping[str, Any] | None = None,
    *,
    sample: int = 0,
    image: int = -1,
    title: str | None = None,
) -> Figure:
    """Draw which visual tokens of a picture are kept, tile by tile, their scores, and which patches each of them stands for.

    Runs one prefill with a trimmed cache of its own; the model's other generations are not affected. Dropped patches are
    hatched in black and white, which shows on dark and light pictures; a square in a tile's corner is its class token, filled
    if it is kept. With merging, patches of one colour are those that one kept token stands for. Scores
    are head means.

    Args:
        model: an Mllama model.
        inputs: what `generate` gets, from the processor: `input_ids`, `pixel_values`, `aspect_ratio_ids`, ...
        config: the trimming to be shown, as for `TrimmedCache`.
        sample: which sample of the batch.
        image: which picture of the sample; the last one by default, which is what decoding reads.
        title: heading of the figure, for instance question and answer.

    Returns:
        A matplotlib figure, which shows itself in a notebook; save it with `figure.savefig("kept.png")`.

    Raises:
        ValueError: the inputs hold no such picture, or the configuration is exact (then nothing is chosen).

    Example:
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> figure = visualize(model, ask(processor), {"top_k_ratio": 0.25})
        >>> [axes.get_title().split(":")[0] for axes in figure.axes[:2]]
        ['kept', 'score']
    """
    settings = TrimConfig.of(config)
    if settings.keeps_reachable:
        raise ValueError(
            "Exact mode chooses nothing that could be shown. Leave top_k_ratio out, or give a smaller one."
        )
    tile_map = tile_map_of(model, inputs, sample, image)
    inputs = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    recorder = ScoreRecorder()
    cache = TrimmedCache(
        model,
        TrimConfig(
            processors=(recorder, *settings.processor_list), merge=settings.merge, tower_share=settings.tower_share
        ),
    )
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    total = cache.report().total_tokens[0]
    kept = np.zeros(total)
    kept[cache.kept_indices[0].cpu().numpy()] = 1.0
    holding = holders(model, cache, recorder) if settings.merge else None
    return _draw(picture_as_seen(inputs, image, tile_map), tile_map, kept, recorder.scores(), holding, title)


def tile_map_of(model: Any, inputs: Mapping[str, torch.Tensor], sample: int, image: int) -> TileMap:
    """Where the visual tokens of a picture lie; arguments as of `visualize`.

    Raises:
        ValueError: the inputs hold no such picture.
    """
    ratios = inputs.get("aspect_ratio_ids")
    if ratios is None or not -ratios.shape[1] <= image < ratios.shape[1] or not 0 <= sample < ratios.shape[0]:
        raise ValueError(
            f"The inputs hold no picture {image} of sample {sample}. Give pixel_values and aspect_ratio_ids."
        )
    ratio = int(ratios[sample, image])
    if ratio == 0:
        raise ValueError(
            f"Picture {image} of sample {sample} is empty: it pads a batch with different numbers of pictures."
        )
    vision = model.config.vision_config
    rows, columns = vision.supported_aspect_ratios[ratio - 1]
    return TileMap(rows, columns, tile_side(vision), (image % ratios.shape[1]) * picture_tokens(vision))


def picture_as_seen(inputs: Mapping[str, torch.Tensor], image: int, tile_map: TileMap) -> np.ndarray:
    """The picture of the first sample as the model sees it, padded to whole tiles: (height, width, 3) in 0…1."""
    tiles = inputs["pixel_values"][0, image, : tile_map.rows * tile_map.columns].float().cpu().numpy()
    _, channels, height, width = tiles.shape
    grid = tiles.reshape(tile_map.rows, tile_map.columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = grid.reshape(tile_map.rows * height, tile_map.columns * width, channels)
    low, high = picture.min(), picture.max()
    return (picture - low) / max(high - low, 1e-9)


def _draw(
    picture: np.ndarray,
    tile_map: TileMap,
    kept: np.ndarray,
    scores: np.ndarray,
    holding: np.ndarray | None,
    title: str | None,
) -> Figure:
    height, width = picture.shape[:2]
    panels = 2 if holding is None else 3
    figure = KeptFigure(figsize=(5.5 * panels, 1.9 + 5 * min(height / width, 2.0)), layout="constrained")
    left, right, *last = figure.subplots(1, panels)
    patches, class_tokens = tile_map.patches(kept), tile_map.class_tokens(kept)
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    left.imshow(picture, interpolation="nearest")
    left.imshow(dropped_overlay(patches), interpolation="nearest", extent=whole)
    left.set_title(
        f"kept: {int(patches.sum() + class_tokens.sum())} of {patches.size + class_tokens.size} visual tokens\n"
        f"{int(patches.sum())} of {patches.size} patches, {int(class_tokens.sum())} of {class_tokens.size} class tokens"
    )
    right.imshow(picture.mean(axis=2), cmap="gray", interpolation="nearest", alpha=0.35)
    heat = right.imshow(tile_map.patches(scores), cmap="magma", interpolation="nearest", alpha=0.85, extent=whole)
    right.set_title("score: attention of the text, mean over heads")
    figure.colorbar(heat, ax=right, shrink=0.8)
    if holding is not None:
        _draw_holding(last[0], picture, tile_map, kept, holding)
    for axes in (left, right, *last):
        _draw_tiles(axes, tile_map, height, width)
    _draw_class_tokens(left, class_tokens, height / tile_map.rows, width / tile_map.columns)
    _draw_legend(figure)
    if title:
        figure.suptitle(title, parse_math=False)  # a price has a dollar, too
    return figure


def _draw_holding(axes: Axes, picture: np.ndarray, tile_map: TileMap, kept: np.ndarray, holding: np.ndarray) -> None:
    held = tile_map.patches(holding)
    draw_regions(axes, picture, held, tile_map.patches(kept) > 0)
    regions, largest = np.unique(held[held >= 0], return_counts=True)
    axes.set_title(
        f"merged: {len(regions)} kept tokens stand for {int((held >= 0).sum())} patches\n"
        f"one colour, one token, a dot its own patch; most: {largest.max(initial=0)}"
    )


def draw_regions(axes: Axes, picture: np.ndarray, holding: np.ndarray, own: np.ndarray) -> None:
    """Draw a picture in regions: patches of one colour are held by one kept token, whose own patch has a dot.

    Args:
        axes: where to draw.
        picture: (height, width, 3) in 0…1.
        holding: int (rows, columns), a patch's kept token; −1 for none.
        own: bool (rows, columns), the patch is kept itself.
    """
    height, width = picture.shape[:2]
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
    zoom = (height // holding.shape[0], width // holding.shape[1])
    names = np.unique(holding[holding >= 0])
    colours = np.concatenate([_colours(len(names)), np.ones((1, 3))])
    number = np.where(holding < 0, len(names), np.searchsorted(names, holding))
    tinted = np.kron(number, np.ones(zoom, dtype=int))
    axes.imshow((1 - TINT) * grey + TINT * colours[tinted], interpolation="nearest")
    tops, lefts = np.arange(len(number) + 1) * zoom[0] - 0.5, np.arange(number.shape[1] + 1) * zoom[1] - 0.5
    rows, columns = np.nonzero(number[:, :-1] != number[:, 1:])
    axes.vlines(lefts[columns + 1], tops[rows], tops[rows + 1], color="black", linewidth=0.8)
    rows, columns = np.nonzero(number[:-1] != number[1:])
    axes.hlines(tops[rows + 1], lefts[columns], lefts[columns + 1], color="black", linewidth=0.8)
    rows, columns = np.nonzero(own)
    axes.scatter((columns + 0.5) * zoom[1] - 0.5, (rows + 0.5) * zoom[0] - 0.5, s=7, color="black", zorder=3)


def _colours(count: int) -> np.ndarray:
    """Colours that differ however many there are, (count, 3): hues a golden ratio apart, in three lightnesses."""
    number = np.arange(count)
    lightness = np.array([(0.85, 0.95), (0.5, 0.9), (0.7, 0.65)])[number % 3]
    return np.asarray(hsv_to_rgb(np.column_stack([number * 0.618034 % 1.0, lightness])))


def dropped_overlay(kept: np.ndarray) -> np.ndarray:
    """Black and white stripes where patches were dropped: they show on dark, light and grey pictures alike.

    Args:
        kept: bool or 0 and 1 (rows, columns), one a patch.

    Returns:
        uint8 RGBA (rows · n, columns · n, 4) to be laid over the picture; n makes its longer side about 400.

    Example:
        >>> overlay = dropped_overlay(np.array([[True, False]]))
        >>> overlay.shape, overlay[:, :200, 3].max().item(), overlay[:, 200:, 3].min().item()
        ((200, 400, 4), 0, 150)
    """
    cell = max(STRIPE, -(-OVERLAY_SIDE // max(kept.shape)))
    dropped = np.kron(1 - kept.astype(np.uint8), np.ones((cell, cell), dtype=np.uint8))
    rows, columns = np.indices(dropped.shape)
    stripes = ((rows + columns) // STRIPE % 2 * 255).astype(np.uint8)
    return np.dstack([stripes, stripes, stripes, dropped * STRIPE_ALPHA])


def _draw_legend(figure: Figure) -> None:
    figure.legend(
        handles=[
            Patch(
                facecolor="white",
                edgecolor="black",
                hatch="//////",
                label="patch that was dropped, or merged into another",
            ),
            Patch(facecolor=CLASS_TOKEN, edgecolor=CLASS_TOKEN, label="a tile's class token, kept"),
            Patch(facecolor="none", edgecolor=CLASS_TOKEN, label="a tile's class token, dropped"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )


def _draw_tiles(axes: Axes, tile_map: TileMap, height: int, width: int) -> None:
    axes.set_axis_off()
    for row in range(tile_map.rows + 1):
        axes.axhline(row * height / tile_map.rows - 0.5, color="white", linewidth=1.5)
    for column in range(tile_map.columns + 1):
        axes.axvline(column * width / tile_map.columns - 0.5, color="white", linewidth=1.5)


def _draw_class_tokens(axes: Axes, kept: np.ndarray, tile_height: float, tile_width: float) -> None:
    size = 0.06 * min(tile_height, tile_width)
    for (row, column), flag in np.ndenumerate(kept):
        corner = (column * tile_width - 0.5 + size / 2, row * tile_height - 0.5 + size / 2)
        axes.add_patch(Rectangle(corner, size, size, fill=bool(flag), color=CLASS_TOKEN, linewidth=1.5))
