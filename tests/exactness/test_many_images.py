"""Many pictures: in a row like a video's frames, between texts, and unequally many in a batch."""

from __future__ import annotations

import math

import pytest
import torch

from trim_plugin.compat import cache_of
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.visibility import Visibility

from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from ..reference_rule import check_kept

EXACT = {"top_k_ratio": 1.0}
VIDEO = Sample((3, (6,) * 32, 7))
INTERLEAVED = Sample((2, (1,), 3, (2, 3), 2, (6,), 1, (4,), 4))


def test_32_frames_are_one_visibility_group():
    model = random_model(seed=4)
    inputs = random_inputs(model, [VIDEO])
    assert torch.equal(generate(model, inputs).sequences, trimmed(model, inputs, EXACT).sequences)
    ours = trimmed(model, inputs, {"top_k_ratio": 0.05})
    check_kept(cache_of(ours).kept_indices, model, inputs, 0.05)
    kept = cache_of(ours).kept_indices[0].tolist()
    report = cache_of(ours).report()
    assert report.total_tokens == [32 * 4 * 5]
    # A group of 32 × 4 tiles shares k among all frames (the frames' own rows see fewer of them, so there are more groups).
    assert max(kept) >= 31 * 20
    assert report.cross_kv_bytes < 0.5 * report.stock_cross_kv_bytes


def test_scoring_32_frames_needs_little_scratch():
    """32 frames × 4 tiles × 1,601 tokens; measured by torch's own accounting of CPU memory."""
    heads, rows, dim, tokens = 2, 128, 16, 32 * 4 * 1601
    queries, keys = torch.randn(1, heads, rows, dim), torch.randn(1, 1, tokens, dim)
    seen = Visibility(torch.ones(1, rows, 1, dtype=torch.bool), torch.zeros(1, rows, dtype=torch.bool))
    tile_of = torch.zeros(1, tokens, dtype=torch.long)
    held, peak = 0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        scores = visual_token_scores(queries, keys, seen, tile_of, dim**-0.5)
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert float(scores[0, 0].sum()) == pytest.approx(1.0, abs=1e-3)
    assert 0 < peak - scores.numel() * 4 < 64 * 2**20


@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_interleaved_pictures(ratio):
    model = random_model(seed=5)
    inputs = random_inputs(model, [INTERLEAVED])
    ours = trimmed(model, inputs, {"top_k_ratio": ratio})
    last = set(range(4 * 20, 5 * 20))
    kept = set(cache_of(ours).kept_indices[0].tolist())
    assert kept <= last, "the last rows read the last picture only"
    if ratio == 1.0:
        stock = generate(model, inputs)
        assert torch.equal(stock.sequences, ours.sequences)
        assert len(kept) == 4 * 5
    else:
        check_kept(cache_of(ours).kept_indices, model, inputs, ratio)
        assert len(kept) >= math.ceil(0.2 * 20)


BATCHES = {
    "1, 3 and 2 pictures": [Sample(((6,), 5)), Sample((1, (1,), 3, (2, 3), 4)), Sample((2, (4, 4), 3))],
    "one without": [Sample(((6,), 5)), Sample((9,)), Sample((2, (1,), 3))],
    "only one with": [Sample((4,)), Sample(((2,), 6)), Sample((7,))],
    "32 beside 1 and 0": [Sample(((6,) * 32, 5)), Sample(((1,), 4)), Sample((6,))],
    "none at all": [Sample((4,)), Sample((6,))],
}


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unequal_batches_equal_stock(samples, attention):
    model = random_model(seed=6, attention=attention)
    inputs = random_inputs(model, samples)
    for settings in ({}, {"num_beams": 2}):
        stock, ours = generate(model, inputs, **settings), trimmed(model, inputs, EXACT, **settings)
        assert torch.equal(stock.sequences, ours.sequences)
        assert largest_difference(stock, ours) <= 1e-5


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_a_sample_without_pictures_keeps_stocks_output(samples):
    """It reads everything in stock's attention, other samples' empty slots too; so it keeps everything, trimmed or not."""
    model = random_model(seed=6)
    inputs = random_inputs(model, samples)
    stock, ours = generate(model, inputs), trimmed(model, inputs, {"top_k_ratio": 0.05})
    for index, sample in enumerate(samples):
        if sample.pictures:
            continue
        assert torch.equal(stock.sequences[index], ours.sequences[index])
        for mine, theirs in zip(ours.logits, stock.logits, strict=True):
            assert float((mine[index] - theirs[index]).abs().max()) <= 1e-5
        if "pixel_values" in inputs:
            report = cache_of(ours).report()
            assert report.kept_tokens[index] == report.total_tokens[index]
            assert report.visible_tokens[index] == 0
