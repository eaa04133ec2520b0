import dataclasses
from collections import Counter

import pytest

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.compat import cache_of
from trim_plugin.planning import configuration, model_sizes, planner, working_set
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import PlannedVariant

from ..random_models import Sample, generate, random_config, random_inputs, trimmed

CONFIG = configuration.built_in_config("11b")
STOCK, EXACT = PlannedVariant("stock"), PlannedVariant("exact", 1.0)
TRIMMED = PlannedVariant("trimmed", 0.1)


def planned(variant, config=CONFIG, weights="bf16", **job):
    return planner.plan(config, Job(**job), variant, weights=weights)


@pytest.mark.parametrize(
    ("parts", "images", "tiles", "readable"),
    [((1, (1,), 5), 1, 1, 1), ((1, (6,), 5), 1, 4, 1), (((6, 6), 5), 2, 4, 2), (((6,), 4, (6,), 5), 2, 4, 1)],
)
@pytest.mark.parametrize(("batch", "expand_size"), [(1, 1), (3, 1), (2, 2)])
def test_caches_are_exact_to_the_byte(parts, images, tiles, readable, batch, expand_size, model):
    inputs = random_inputs(model, [Sample(parts)] * batch)
    new = 5
    job = Job(batch, images, tiles, readable, inputs["input_ids"].shape[1], new, expand_size=expand_size)
    how = {"num_return_sequences": expand_size, "do_sample": expand_size > 1}
    exact = cache_of(trimmed(model, inputs, {"top_k_ratio": 1.0}, new, **how)).report()
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.1}, new, **how))
    found = [planner.plan(model.config, job, variant, weights="fp32") for variant in (STOCK, EXACT)]
    assert [plan.cross_kv for plan in found] == [exact.stock_cross_kv_bytes, exact.cross_kv_bytes]
    # What a rule keeps differs from sample to sample: as many classes as the cache has, and never more than is planned for.
    of_sources = Counter(len(own) for own in cache.kept_indices[::expand_size])
    held = sum(width * samples for width, samples in planner.width_classes(of_sources))
    assert model_sizes.cross_kv_bytes(model.config, 1, held, element=4) == cache.report().cross_kv_bytes
    readable_tokens = readable * tiles * tile_tokens(model.config.vision_config)
    mean = sum(count * samples for count, samples in of_sources.items()) / batch / readable_tokens
    forecast = planner.plan(model.config, job, PlannedVariant("trimmed", mean, 0.1), weights="fp32")
    assert cache.report().cross_kv_bytes <= forecast.cross_kv
    assert ("cross_kv" in forecast.upper_bounds) == (batch > 1)
    assert {plan.self_kv for plan in found} == {exact.self_kv_bytes}
    if expand_size == 1:
        stock = cache_of(generate(model, inputs, new))
        assert found[0].cross_kv == sum(
            stock.layers[i].keys.nbytes + stock.layers[i].values.nbytes
            for i in model.model.language_model.cross_attention_layers
        )


def test_samples_of_different_tiles_are_counted_one_by_one(model):
    """Against a cache that holds them: three pictures of one tile, one of four."""
    tiles = (1, 1, 1, 4)
    samples = [Sample((1, ((6,) if count == 4 else (1,)), 5)) for count in tiles]
    inputs = random_inputs(model, samples)
    job = Job(4, 1, tiles, 1, inputs["input_ids"].shape[1], 5)
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 1.0}, 5))
    found = planner.plan(model.config, job, EXACT, weights="fp32")
    assert [len(own) for own in cache.kept_indices] == [5, 5, 5, 20]
    assert (found.kept_tokens, found.held_tokens) == (20, 35)
    assert found.cross_kv == cache.report().cross_kv_bytes
    one_by_one = planned(TRIMMED, batch=8, tiles=tiles)
    fullest, smallest = (planned(TRIMMED, batch=8, tiles=count).cross_kv for count in (4, 1))
    assert one_by_one.cross_kv == (2 * fullest + 6 * smallest) // 8
    assert planned(STOCK, batch=8, tiles=tiles) == planned(STOCK, batch=8)


def test_where_a_number_is_an_upper_bound_is_said():
    assert planned(TRIMMED, batch=8, tiles=4).upper_bounds == ()
    assert planned(TRIMMED, batch=8, tiles=(4, 4)).upper_bounds == ()
    assert planned(TRIMMED, batch=2, tiles=(1, 1, 4)).upper_bounds == ()  # the third is not in the batch
    mixed = planned(TRIMMED, batch=8, tiles=(1, 4))
    assert {"prefill_set", "prefill_peak", "needed"} <= set(mixed.upper_bounds)
    assert not {"cross_kv", "self_kv", "decode_peak"} & set(mixed.upper_bounds)
    of_a_ratio = planned(PlannedVariant("trimmed", 0.3, 0.1), batch=8)
    assert {"cross_kv", "prefill_peak", "decode_peak", "needed"} <= set(of_a_ratio.upper_bounds)
    assert planned(PlannedVariant("trimmed", 0.3, 0.1)).upper_bounds == ()  # one sample
    assert of_a_ratio.cross_kv > planned(PlannedVariant("trimmed", 0.3), batch=8).cross_kv
    assert planned(PlannedVariant("exact", 1.0, 1.0), batch=8).upper_bounds == ()
    fullest, smallest = (planned(TRIMMED, batch=8, tiles=tiles) for tiles in (4, 1))
    assert smallest.prefill_peak <= mixed.prefill_peak <= fullest.prefill_peak


def test_stock_reads_every_picture_at_once_and_pieces_do_not():
    rising = [planned(STOCK, batch=batch).prefill_set for batch in (8, 16)]
    flat = [planned(TRIMMED, batch=batch) for batch in (8, 16)]
    assert rising[1] > 1.99 * rising[0]
    assert flat[0].at_a_time == flat[1].at_a_time == (1, 4)
    assert flat[0].prefill_set == flat[1].prefill_set
    assert flat[1].prefill_kv == (flat[1].cross_kv + flat[1].prompt_kv) * 12 // 16  # the last piece has none yet


def test_smaller_pieces_need_less_and_one_piece_needs_what_stock_needs():
    sizes = [planned(dataclasses.replace(TRIMMED, prefill_pictures=n), batch=8).prefill_peak for n in (1, 2, 8)]
    assert sizes == sorted(sizes)
    assert sizes[2] == planned(STOCK, batch=8).prefill_peak


def test_the_towers_states_of_every_layer_are_counted():
    vision = CONFIG.vision_config
    fewer = configuration.built_in_config("11b")
    fewer.vision_config.num_hidden_layers -= 4
    padded = 4 * 1608
    assert working_set.tower(CONFIG, 2, 2) - working_set.tower(fewer, 2, 2) == 2 * 4 * padded * vision.hidden_size * 2


def test_no_tower_where_pictures_come_encoded():
    assert planned(TRIMMED, tower=False).prefill_set < 0.5 * planned(TRIMMED).prefill_set


def test_expand_size_multiply_text_and_not_pictures():
    one, four = (planned(TRIMMED, batch=8, expand_size=expand_size) for expand_size in (1, 4))
    assert four.cross_kv == one.cross_kv
    assert four.self_kv == 4 * one.self_kv
    stock = planned(STOCK, batch=8, expand_size=4)
    assert stock.cross_kv == planned(STOCK, batch=32).cross_kv
    assert stock.prefill_set == planned(STOCK, batch=32).prefill_set


def test_longer_answers_never_need_less():
    for variant in (STOCK, TRIMMED):
        short, long = (planned(variant, batch=64, new_tokens=new) for new in (8, 4096))
        assert long.prefill_set == short.prefill_set
        assert long.decode_set >= short.decode_set
        assert long.decode_peak > short.decode_peak


def test_pixels_count_where_the_caller_puts_them_on_the_device():
    job = {"batch": 10, "images": 2}
    more = planned(TRIMMED, **job, pixels_on_device=True).peak - planned(TRIMMED, **job).peak
    assert more == 10 * 2 * 4 * 3 * 560 * 560 * 4


def test_the_reserve_is_part_of_what_is_needed_and_not_of_the_peak():
    with_it, without = (planner.plan(CONFIG, Job(), TRIMMED, reserve=size) for size in (2**30, 0))
    assert with_it.peak == without.peak == without.needed == with_it.needed - 2**30


def test_variants_of_several_ratios_are_told_apart():
    names = [variant.name for variant in planner.variants((0.25, 0.1), (0.3,))]
    assert names == ["stock", "exact", "trimmed 0.25", "trimmed 0.1", "trimmed 30 %"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Job(batch=0), "batch must be a positive integer, got 0"),
        (lambda: Job(tiles=()), "tiles must be a positive integer, or one for each sample"),
        (lambda: Job(tiles=(1, 0)), "tiles must be a positive integer, got 0"),
        (lambda: planned(TRIMMED, random_config(), batch=2, tiles=(1, 5)), "tiles must be at most 4"),
        (lambda: Job(expand_size=1.5), "expand_size must be a positive integer, got 1.5"),
        (lambda: Job(images=1, readable_images=2), r"readable_images must be at most images \(1\), got 2"),
        (lambda: PlannedVariant("trimmed", 1.5), r"kept_share must be .* got 1.5"),
        (lambda: model_sizes.weight_bytes(random_config(), "int3"), "weights must be one of .* got 'int3'"),
        (lambda: model_sizes.cross_kv_bytes(random_config(), 1, 1, "int3"), "kv must be one of .* got 'int3'"),
        (lambda: planner.expected_kept_share(1.5), r"top_k_ratio must be a number in \(0, 1\], got 1.5"),
        (lambda: planner.expected_kept_share(0.0), r"top_k_ratio must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
