"""Draw the figures of the explanation pages from the small trained model: `python docs/make_figures.py`.

Attention is recorded in the prefill, by running the model with eager attention and asking for its maps, so that nothing of
trim_plugin's own scoring enters the sparsity and overlap figures.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import trim_plugin
from benchmarks.small_model import fine
from benchmarks.small_model.scenes import draw_scene
from trim_plugin.embedded import Example, ask, examples, load_small_model
from trim_plugin.pictures.visualize import picture_as_seen, tile_map_of

ASSETS = Path(__file__).parent / "assets"
RATIO = 0.25
#: A scene that keeps about as much as the mean scene does.
HERO_SEED, HERO_QUESTION = 110, "Read all digits."
RATIOS = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75)


def cross_attention(model: Any, inputs: dict[str, torch.Tensor]) -> dict[int, np.ndarray]:
    """Mean attention of the rows that read the picture, (heads, visible tokens), by cross-attention layer."""
    maps: dict[int, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.language_model.layers):
        if hasattr(layer, "cross_attn"):

            def record(module: Any, args: Any, output: Any, index: int = index) -> None:
                maps[index] = output[1][0]

            hooks.append(layer.cross_attn.register_forward_hook(record))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    mask = inputs["cross_attention_mask"][0].flatten(1).bool()  # rows, images x tiles
    tokens = next(iter(maps.values())).shape[-1] // mask.shape[1]
    rows, visible = mask.any(1), mask.any(0).repeat_interleave(tokens)
    return {index: found[:, rows][:, :, visible].mean(1).float().numpy() for index, found in maps.items()}


def union_of_best(attention: np.ndarray, ratio: float) -> set[int]:
    """Union over the heads of each head's best share of the tokens."""
    k = max(1, math.ceil(ratio * attention.shape[1]))
    return set(np.argsort(-attention, axis=1, kind="stable")[:, :k].ravel().tolist())


def draw_sparsity(found: list[dict[int, np.ndarray]]) -> None:
    """Share of attention held by the best share of the tokens."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grid = np.linspace(0, 1, 101)
    for layer in found[0]:
        curves = []
        for attention in (maps[layer] for maps in found):
            ranked = -np.sort(-attention, axis=1)
            held = np.concatenate([np.zeros((len(ranked), 1)), ranked.cumsum(1) / ranked.sum(1, keepdims=True)], axis=1)
            curves += [np.interp(grid, np.linspace(0, 1, held.shape[1]), curve) for curve in held]
        axes.plot(100 * grid, 100 * np.mean(curves, axis=0), label=f"layer {layer}")
    axes.plot([0, 100], [0, 100], color="gray", linewidth=0.8, linestyle="--", label="even attention")
    axes.set_xlabel("best visual tokens (% of the visible)")
    axes.set_ylabel("attention they hold (%)")
    axes.legend()
    figure.savefig(ASSETS / "sparsity.png", dpi=130)


def draw_overlap(found: list[dict[int, np.ndarray]]) -> None:
    """How much of a layer's choice is in another's."""
    layers = list(found[0])
    overlap = np.zeros((len(layers), len(layers)))
    for maps in found:
        chosen = [union_of_best(maps[layer], RATIO) for layer in layers]
        overlap += np.array([[len(a & b) / len(a) for b in chosen] for a in chosen])
    overlap *= 100 / len(found)
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(overlap, vmin=0, vmax=100, cmap="viridis")
    names = [f"layer {layer}" for layer in layers]
    axes.set_xticks(range(len(layers)), names)
    axes.set_yticks(range(len(layers)), names)
    for (row, column), value in np.ndenumerate(overlap):
        axes.text(column, row, f"{value:.0f} %", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_title(f"row's union at ratio {RATIO:g} that is in the column's", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(ASSETS / "overlap.png", dpi=130)


def draw_kept_share(model: Any, processor: Any, chosen: list[Example]) -> None:
    """Kept share over the ratio."""
    shares = []
    for ratio in RATIOS:
        kept = []
        for example in chosen:
            cache = trim_plugin.TrimmedCache(model, {"top_k_ratio": ratio})
            with torch.no_grad():
                model(**ask(processor, example.question, example.picture), cache=cache, use_cache=True)
            kept.append(cache.report().kept_share)
        shares.append(100 * float(np.mean(kept)))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * ratio for ratio in RATIOS], shares, marker="o", label="kept: union over the heads")
    axes.plot([0, 100], [0, 100], color="gray", linewidth=0.8, linestyle="--", label="if all heads agreed")
    axes.set_xlabel("top_k_ratio (%)")
    axes.set_ylabel("kept visual tokens (% of the visible)")
    axes.legend()
    figure.savefig(ASSETS / "kept_share.png", dpi=130)


def answered(model: Any, processor: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> str:
    """The answer's text."""
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, **settings)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def draw_hero() -> None:
    """The first picture of all: what the model sees, what is kept of it, and that the answer is the same."""
    model, processor = fine.load()
    picture = draw_scene(HERO_SEED, scale=2, held_out=True, layout=(2, 2)).image
    inputs = ask(processor, HERO_QUESTION, picture)
    cache = trim_plugin.TrimmedCache(model)
    answers = [answered(model, processor, inputs), answered(model, processor, inputs, cache=cache)]
    tiles = tile_map_of(model, inputs, 0, 0)
    seen, kept = picture_as_seen(inputs, 0, tiles), np.zeros(cache.report().total_tokens[0])
    kept[cache.kept_indices[0].numpy()] = 1
    shown = np.kron(tiles.patches(kept), np.ones([seen.shape[0] // (tiles.rows * tiles.side)] * 2))[..., None]
    share = cache.report().kept_share

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    titles = ["transformers caches all of it", f"trim_plugin caches {share:.0%} of it"]
    for axes, image, title, answer in zip(
        figure.subplots(1, 2), [seen, seen * shown + 0.93 * (1 - shown)], titles, answers, strict=True
    ):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=13)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{HERO_QUESTION}\n" + textwrap.fill(answer, 34), fontsize=12, labelpad=8)
    figure.savefig(ASSETS / "hero.png", dpi=110)


def main() -> None:
    """Write all figures."""
    draw_hero()
    ASSETS.mkdir(exist_ok=True)
    model, processor = load_small_model()
    chosen = examples()
    model.set_attn_implementation("eager")
    found = [cross_attention(model, ask(processor, example.question, example.picture)) for example in chosen]
    draw_sparsity(found)
    draw_overlap(found)
    model.set_attn_implementation("sdpa")
    draw_kept_share(model, processor, chosen)
    several = max(
        chosen, key=lambda example: int(ask(processor, picture=example.picture)["cross_attention_mask"].sum())
    )
    figure = trim_plugin.visualize(model, ask(processor, several.question, several.picture), {"top_k_ratio": RATIO})
    figure.savefig(ASSETS / "kept.png", dpi=80)
    rule = {"processors": [trim_plugin.KCenter(0.1)]}
    figure = trim_plugin.visualize(model, ask(processor, several.question, several.picture), rule)
    figure.savefig(ASSETS / "regions.png", dpi=80)


if __name__ == "__main__":
    main()
