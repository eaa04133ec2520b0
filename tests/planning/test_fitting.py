import dataclasses
import re

import pytest

from trim_plugin.planning import configuration, fitting, planner
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import PlannedVariant

CONFIG = configuration.built_in_config("11b")
GIB = 2**30
STOCK, EXACT = PlannedVariant("stock"), PlannedVariant("exact", 1.0)
TRIMMED = PlannedVariant("trimmed", 0.1, kv_quantization="nf4")


@pytest.mark.parametrize("variant", [STOCK, EXACT, TRIMMED])
@pytest.mark.parametrize("expand_size", [1, 3])
def test_what_fits_does_fit_and_one_more_does_not(variant, expand_size):
    job, memory = Job(expand_size=expand_size), 40 * GIB
    batch = fitting.largest_fit(CONFIG, job, variant, memory).largest_batch
    needed = [planner.plan(CONFIG, dataclasses.replace(job, batch=batch + more), variant).needed for more in (0, 1)]
    assert needed[0] <= memory < needed[1]


def test_one_call_takes_twenty_times_as_many_samples_in_pieces():
    stock, trimmed = (
        fitting.largest_fit(CONFIG, Job(), variant, 24 * GIB, weights="nf4") for variant in (STOCK, TRIMMED)
    )
    assert stock.limit == "prefill"
    assert trimmed.limit == "self KV"
    assert trimmed.largest_batch >= 20 * stock.largest_batch > 0


@pytest.mark.parametrize(
    ("variant", "job", "limit", "reason"),
    [
        (STOCK, Job(), "prefill", r"reading the prompts needs prefill .* GiB, and .* GiB are left"),
        (EXACT, Job(), "cross KV", r"reading the prompts needs cross KV .* GiB are left"),
        (TRIMMED, Job(new_tokens=4096), "self KV", r"decoding needs cross KV .*, self KV .* GiB are left"),
    ],
)
def test_what_limits_is_said(variant, job, limit, reason):
    fit = fitting.largest_fit(CONFIG, job, variant, 40 * GIB)
    assert fit.limit == limit
    assert re.search(reason, fit.reason)


def test_zero_samples_come_with_the_reason():
    fit = fitting.largest_fit(CONFIG, Job(images=32, tiles=1), STOCK, 24 * GIB, weights="nf4")
    assert (fit.largest_batch, fit.limit) == (0, "prefill")
    assert "reading the prompts needs" in fit.reason


@pytest.mark.parametrize(
    ("shape", "memory", "weights", "instead"),
    [
        ("11b", 12, "bf16", r"They fit in nf4 \(6.73 GiB\), or spread over devices of this size: at least 2 in bf16$"),
        ("11b", 16, "bf16", r"They fit in int8 \(.* GiB\) or nf4 \(6.73 GiB\), or spread .*: at least 2 in bf16$"),
        ("11b", 4, "nf4", r"They fit in no format, only spread over devices of this size: at least 3 in nf4$"),
        ("90b", 24, "bf16", r"They fit in no format, only spread over .*: at least 8 in bf16 or 2 in nf4$"),
    ],
)
def test_weights_that_do_not_fit_come_with_what_would(shape, memory, weights, instead):
    config = configuration.built_in_config(shape)
    fit = fitting.largest_fit(config, Job(), TRIMMED, memory * GIB, weights=weights)
    assert (fit.largest_batch, fit.limit) == (0, "weights")
    assert re.search(instead, fit.reason), fit.reason
    for name in re.findall(r"(int8|nf4) \(", fit.reason):
        assert fitting.largest_fit(config, Job(), TRIMMED, memory * GIB, weights=name).limit != "weights"


def test_a_reserve_that_leaves_nothing_is_said():
    fit = fitting.largest_fit(CONFIG, Job(), TRIMMED, GIB, reserve=2 * GIB)
    assert (fit.limit, fit.reason) == ("weights", "the reserve alone takes 2.00 GiB")


def test_a_mixed_batch_takes_more_samples_than_one_of_the_fullest():
    mixed, fullest = (
        fitting.largest_fit(CONFIG, Job(tiles=tiles), EXACT, 24 * GIB, weights="nf4").largest_batch
        for tiles in ((4, 1, 1, 1), 4)
    )
    assert mixed >= fullest > 0
