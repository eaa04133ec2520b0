import pytest

from trim_plugin.planning import model_sizes, planner

from ..random_models import Sample, generate, random_config, random_inputs, trimmed


@pytest.mark.parametrize(
    ("parts", "images", "tiles", "readable"),
    [((1, (1,), 5), 1, 1, 1), ((1, (6,), 5), 1, 4, 1), (((6, 6), 5), 2, 4, 2), (((6,), 4, (6,), 5), 2, 4, 1)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_caches_are_exact_to_the_byte(parts, images, tiles, readable, batch, model):
    inputs = random_inputs(model, [Sample(parts)] * batch)
    new = 5
    job = planner.Job(batch, images, tiles, readable, inputs["input_ids"].shape[1], new)
    exact = trimmed(model, inputs, {"top_k_ratio": 1.0}, new).past_key_values.report()
    cache = trimmed(model, inputs, {"top_k_ratio": 0.1}, new).past_key_values
    share = max(map(len, cache.kept_indices)) / (readable * tiles * model_sizes.tile_tokens(model.config))
    ways = planner.plan(model.config, job, weights="float32", kept_share=share)
    assert [way.cross_kv for way in ways] == [
        exact.stock_cross_kv_bytes,
        exact.cross_kv_bytes,
        cache.report().cross_kv_bytes,
    ]
    assert {way.self_kv for way in ways} == {exact.self_kv_bytes}
    stock = generate(model, inputs, new).past_key_values
    assert ways[0].cross_kv == sum(stock.layers[i].keys.nbytes + stock.layers[i].values.nbytes for i in (1, 3))


def test_what_fits_does_fit_and_one_more_does_not():
    config, memory = random_config(), 200 * 2**20
    for way, (name, fit) in enumerate(planner.largest_fit(config, planner.Job(), memory).items()):
        peaks = [planner.plan(config, planner.Job(batch=fit.batch + more))[way] for more in (0, 1)]
        assert peaks[0].name == name
        assert peaks[0].peak <= memory < peaks[1].peak
    assert planner.largest_fit(config, planner.Job(), 1000)["stock"] == planner.Fit(0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planner.Job(batch=0), "batch must be a positive integer, got 0"),
        (lambda: planner.Job(images=1, readable_images=2), r"readable_images must be at most images \(1\), got 2"),
        (lambda: planner.plan(random_config(), planner.Job(tiles=5)), "tiles must be at most 4"),
        (lambda: planner.plan(random_config(), planner.Job(), kept_share=1.5), r"kept_share must be .* got 1.5"),
        (lambda: model_sizes.weight_bytes(random_config(), "int3"), "weights must be one of .* got 'int3'"),
        (lambda: model_sizes.cross_kv_bytes(random_config(), 1, 1, "int3"), "kv must be one of .* got 'int3'"),
        (lambda: planner.expected_kept_share(1.5), r"top_k_ratio must be a number in \(0, 1\], got 1.5"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
