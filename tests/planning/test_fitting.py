import dataclasses
import re

import pytest

from trim_plugin.planning import fitting, model_sizes, planner
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import Way

CONFIG = model_sizes.built_in_config("11b")
GIB = 2**30
TRIMMED = Way("trimmed", 0.1, kv_quantization="nf4")


@pytest.mark.parametrize("way", [Way("stock"), Way("exact", 1.0), TRIMMED])
@pytest.mark.parametrize("copies", [1, 3])
def test_what_fits_does_fit_and_one_more_does_not(way, copies):
    job, memory = Job(copies=copies), 40 * GIB
    batch = fitting.largest_fit(CONFIG, job, way, memory).largest_batch
    needed = [planner.plan(CONFIG, dataclasses.replace(job, batch=batch + more), way).needed for more in (0, 1)]
    assert needed[0] <= memory < needed[1]


def test_one_call_takes_twenty_times_as_many_samples_in_pieces():
    stock, trimmed = (
        fitting.largest_fit(CONFIG, Job(), way, 24 * GIB, weights="nf4") for way in (Way("stock"), TRIMMED)
    )
    assert stock.limit == "prefill"
    assert trimmed.limit == "self KV"
    assert trimmed.largest_batch >= 20 * stock.largest_batch > 0


@pytest.mark.parametrize(
    ("memory", "way", "job", "limit", "reason"),
    [
        (12 * GIB, TRIMMED, Job(), "weights", r"the weights take 19.87 GiB and the reserve 1.00 GiB"),
        (40 * GIB, Way("stock"), Job(), "prefill", r"reading the prompts needs prefill .* GiB, and .* GiB are left"),
        (40 * GIB, Way("exact", 1.0), Job(), "cross KV", r"reading the prompts needs cross KV .* GiB are left"),
        (40 * GIB, TRIMMED, Job(new_tokens=4096), "self KV", r"decoding needs cross KV .*, self KV .* GiB are left"),
    ],
)
def test_what_limits_is_said(memory, way, job, limit, reason):
    fit = fitting.largest_fit(CONFIG, job, way, memory)
    assert fit.limit == limit
    assert re.search(reason, fit.reason)


def test_zero_samples_come_with_the_reason():
    fit = fitting.largest_fit(CONFIG, Job(images=32, tiles=1), Way("stock"), 24 * GIB, weights="nf4")
    assert (fit.largest_batch, fit.limit) == (0, "prefill")
    assert "reading the prompts needs" in fit.reason


@pytest.mark.parametrize(
    ("memory", "batch", "way", "weights", "words"),
    [
        (22, 8, TRIMMED, "bf16", ("prefill_pictures=1",)),
        (24, 400, Way("stock"), "nf4", ("cache_implementation='trimmed'", "--kv-quantization nf4", "--kept-share 0.1")),
        (24, 60, Way("stock"), "nf4", ("cache_implementation='trimmed'",)),
        (12, 4, Way("exact", 1.0), "bf16", ("--weights nf4",)),
    ],
)
def test_the_cheapest_change_fits_and_is_said_in_words(memory, batch, way, weights, words):
    job = Job(batch=batch)
    assert planner.plan(CONFIG, job, way, weights=weights).needed > memory * GIB
    change = fitting.cheapest_change(CONFIG, job, way, memory * GIB, weights=weights)
    assert change.words == words
    assert planner.plan(CONFIG, job, change.way, weights=change.weights).needed == change.needed <= memory * GIB


def test_nothing_makes_too_much_fit():
    assert fitting.cheapest_change(CONFIG, Job(batch=10_000), TRIMMED, 24 * GIB) is None


def test_a_change_never_asks_for_more_than_there_was():
    for memory in (9, 12, 16, 24, 32):
        way = Way("trimmed", 0.25, kv_quantization="int8", prefill_pictures=4)
        change = fitting.cheapest_change(CONFIG, Job(batch=200), way, memory * GIB, weights="int8")
        if change is not None:
            assert change.way.kept_share <= 0.25
            assert change.way.kv_quantization in ("int8", "nf4")
            assert change.weights in ("int8", "nf4")
            assert change.way.prefill_pictures in (1, 4)
