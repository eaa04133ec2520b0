import numpy as np
import pytest
import torch

from trim_plugin import KCenter, TopKPerHead, TrimConfig, TrimmedCache, visualize
from trim_plugin.compat import CACHE
from trim_plugin.forward.holders import ScoreRecorder, holders
from trim_plugin.pictures.visualize import draw_regions

from ..random_models import Sample, random_inputs, random_model


def prefilled(sample, rule):
    model = random_model(seed=2, image_size=16)
    recorder = ScoreRecorder()
    cache = TrimmedCache(model, TrimConfig(processors=(recorder, rule)))
    with torch.no_grad():
        model(**random_inputs(model, [sample], seed=4), **{CACHE: cache}, use_cache=True)
    return cache, holders(model, cache, recorder)


@pytest.mark.parametrize("rule", [TopKPerHead(0.05), KCenter(0.2)])
@pytest.mark.parametrize("sample", [Sample((1, (6,), 6)), Sample((1, (2,), 4, (3,), 5)), Sample((1, (2, 6), 3))])
def test_every_kept_token_holds_as_many_as_its_size_says(sample, rule):
    cache, found = prefilled(sample, rule)
    kept = cache.kept_indices[0].numpy()
    assert (found[kept] == kept).all()
    counts = np.bincount(found[found >= 0], minlength=len(found))
    assert counts[kept].tolist() == cache.kept_sizes[0].tolist()
    assert counts.sum() == cache.kept_sizes[0].sum()


def test_a_border_runs_between_patches_of_different_tokens_and_a_dot_lies_on_each_kept_one():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    holding = np.array([[3, 3], [3, 7], [-1, 7]])
    draw_regions(
        axes,
        np.random.default_rng(0).random((24, 16, 3)),
        holding,
        np.array([[True, False], [False, True], [False, False]]),
    )
    upright, level, dots = axes.collections
    assert [len(upright.get_segments()), len(level.get_segments())] == [
        2,
        2,
    ]  # 3|7, -1|7 side by side; 3 over 7, 3 over -1
    assert dots.get_offsets().tolist() == [[3.5, 3.5], [11.5, 11.5]]
    drawn = axes.images[0].get_array()
    assert not np.allclose(drawn[12, 4], drawn[12, 12], atol=0.05)


def test_the_figure_says_how_many_patches_the_kept_tokens_stand_for():
    model = random_model(seed=2, image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    rule = {"processors": [KCenter(0.2)]}
    merged = visualize(model, inputs, rule)
    titles = [axes.get_title() for axes in merged.axes]
    assert any(title.startswith("merged: ") and "stand for 64 patches" in title for title in titles)
    dropped = visualize(model, inputs, rule | {"merge": False})
    assert not any("merged" in axes.get_title() for axes in dropped.axes)
