import base64
import re

import numpy as np
import pytest
import torch

import trim_plugin
from trim_plugin.compat import cache_of
from trim_plugin.pictures.visualize import ScoreRecorder, TileMap, dropped_overlay, visualize

from ..random_models import Sample, random_inputs
from ..reference_rule import first_cross_attention_map, kept_by_rule


def test_tile_maps_lay_tokens_out_as_the_picture():
    tile_map = TileMap(rows=1, columns=2, side=2, first=3)
    values = np.arange(3 + 2 * 5, dtype=float)
    # tile 0: class token 3, patches 4 5 / 6 7; tile 1: class token 8, patches 9 10 / 11 12
    assert tile_map.patches(values).tolist() == [[4, 5, 9, 10], [6, 7, 11, 12]]
    assert tile_map.class_tokens(values).tolist() == [[3, 8]]


def test_figure_shows_the_kept_tokens_and_the_scores(model):
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((1, (2,), 6))])
    figure = visualize(model, inputs, {"top_k_ratio": 0.2}, sample=0, title="a title")
    kept = kept_by_rule(model, inputs, 0.2)[0]
    patches = [token for token in kept if token % 5]  # the rest are class tokens
    left, right = figure.axes[:2]
    assert left.get_title() == (
        f"kept: {len(kept)} of 20 visual tokens\n{len(patches)} of 16 patches, {len(kept) - len(patches)} of 4 class tokens"
    )
    assert figure.get_suptitle() == "a title"
    shown = right.get_images()[1].get_array()
    attention = first_cross_attention_map(model, inputs)[0].mean(dim=0)
    voters = inputs["cross_attention_mask"][0, :, 0, 0].bool() & inputs["attention_mask"][0].bool()
    expected = TileMap(2, 2, 2, 0).patches(attention[voters].mean(dim=0).numpy())
    np.testing.assert_allclose(shown, expected, rtol=1e-4)


def test_it_shows_the_picture_that_is_asked_for(model):
    inputs = random_inputs(model, [Sample((1, (1,), 2, (2,), 6))])
    assert visualize(model, inputs, image=0).axes[0].get_title().endswith("of 4 patches, 0 of 1 class tokens")
    assert visualize(model, inputs, image=1).axes[0].get_title().endswith("of 2 class tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"top_k_ratio": 1.0}}, "Exact mode chooses nothing"),
        ({"image": 3}, "no picture 3 of sample 0"),
        ({"sample": 5}, "no picture -1 of sample 5"),
        ({"sample": 1, "image": 1}, "Picture 1 of sample 1 is empty"),
    ],
)
def test_what_cannot_be_shown(model, arguments, message):
    inputs = random_inputs(model, [Sample((1, (1,), 2, (2,), 6)), Sample((1, (1,), 2))])
    with pytest.raises(ValueError, match=message):
        visualize(model, inputs, **arguments)


def test_text_cannot_be_shown(model):
    with pytest.raises(ValueError, match="hold no picture"):
        visualize(model, random_inputs(model, [Sample((4,))]))


def test_recorder_keeps_the_last_seen_scores_of_every_group():
    recorder = ScoreRecorder()
    visible = torch.tensor([[True, False, False]])
    recorder(torch.tensor([[[0.5, 0.0, 0.0]]]), visible)
    recorder(torch.tensor([[[0.0, 0.7, 0.0]]]), visible.roll(1, 1))
    assert np.allclose(recorder.scores(), [0.5, 0.7, np.nan], equal_nan=True)


def test_the_count_in_the_title_is_the_caches(model):
    inputs = random_inputs(model, [Sample((1, (4,), 6))])
    for config in (
        {"top_k_ratio": 0.3},
        {"processors": [trim_plugin.KCenter(0.4)]},
        {"top_k_ratio": 0.3, "merge": False},
    ):
        output = model.generate(**inputs, max_new_tokens=1, cache_implementation="trimmed", cache_config=config,
                                return_dict_in_generate=True)  # fmt: skip
        report = cache_of(output).report()
        title = visualize(model, inputs, config).axes[0].get_title()
        assert title.startswith(f"kept: {report.kept_tokens[0]} of {report.visible_tokens[0]} visual tokens")


@pytest.mark.parametrize("shade", [0, 90, 128, 255])
def test_dropped_patches_are_seen_on_any_shade(shade):
    """Stripes differ from the picture under them and from each other; kept patches are left as they are."""
    overlay = dropped_overlay(np.array([[1, 0], [0, 1]])).astype(float)
    alpha = overlay[..., 3:] / 255
    seen = shade * (1 - alpha) + overlay[..., :3] * alpha
    half = len(seen) // 2
    assert (seen[:half, :half] == shade).all()
    dropped = seen[:half, half:, 0]
    assert dropped.max() - dropped.min() > 100
    assert abs(dropped - shade).max() > 60


def test_a_legend_says_what_the_marks_mean(model):
    figure = visualize(model, random_inputs(model, [Sample((1, (1,), 6))]), {"top_k_ratio": 0.2})
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert [sum(word in text for text in said) for word in ("patch", "class token, kept", "class token, dropped")] == [
        1,
        1,
        1,
    ]


def test_what_visualize_returns_shows_itself_in_a_notebook(model):
    figure = visualize(model, random_inputs(model, [Sample((1, (1,), 6))]), {"top_k_ratio": 0.2})
    shown = re.fullmatch(r'<img [^>]*src="data:image/png;base64,([\w+/=]+)">', figure._repr_html_())
    assert base64.b64decode(shown[1]).startswith(b"\x89PNG")
