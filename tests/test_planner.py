import json
from types import SimpleNamespace

import pytest
import torch

from trim_plugin.cli import main
from trim_plugin.commands.plan import parse_bytes
from trim_plugin.planning import model_sizes, planner

from .random_models import Sample, generate, random_config, random_inputs, random_model, trimmed


@pytest.mark.parametrize(("shape", "billions"), [("11b", 10.67), ("90b", 88.6)])
def test_built_in_shapes_have_the_published_sizes(shape, billions):
    total = sum(model_sizes.weight_bytes(model_sizes.built_in_config(shape)).values()) / 2
    assert total == pytest.approx(billions * 1e9, rel=0.005)


def test_weights_equal_a_models(model):
    planned = model_sizes.weight_bytes(model.config, "float32")
    assert sum(planned.values()) == sum(parameter.nbytes for parameter in model.parameters())
    text = model.model.language_model
    crossing = sum(p.nbytes for index in (1, 3) for p in text.layers[index].parameters())
    assert planned["cross-attention layers"] == crossing


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantized_weights_are_within_one_percent(weights, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    presets = pytest.importorskip("trim_plugin.integrations.bitsandbytes")
    assert bitsandbytes
    model = random_model(width=256, heads=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=presets.quantization_config(weights)
    )
    measured = presets.weight_memory(loaded).total
    assert sum(model_sizes.weight_bytes(model.config, weights).values()) == pytest.approx(measured, rel=0.01)


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


@pytest.mark.parametrize("kv", ["int8", "nf4"])
def test_quantized_caches_are_exact_to_the_byte(kv, model):
    pytest.importorskip("trim_plugin.cache.quantized")
    pytest.importorskip("bitsandbytes")
    inputs = random_inputs(model, [Sample((1, (6,), 5))])
    report = trimmed(model, inputs, {"top_k_ratio": 1.0, "kv_quantization": kv}, 3).past_key_values.report()
    assert model_sizes.cross_kv_bytes(model.config, 1, 20, kv) == report.cross_kv_bytes


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


def test_the_command_prints_json(capsys, tmp_path):
    random_config().save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--memory", "20MiB", "--kept-share", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in printed["ways"]] == ["stock", "exact", "trimmed"]
    assert printed["ways"][2]["kept_tokens"] == 10
    assert printed["fits"]["stock"]["side_by_side"] > 0


def test_the_command_prints_a_table(capsys):
    assert main(["plan", "--tiles", "1", "--weights", "nf4"]) == 0
    printed = capsys.readouterr().out
    assert "200.1 MiB" in printed
    assert "50.0 MiB" in printed
    assert "largest batch" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "24 apples"], "--memory must look like 24GiB"),
        (["--model", "/nowhere/at/all"], "cannot load"),
        (["--tiles", "9"], "tiles must be at most 4"),
        (["--top-k-ratio", "7"], "--top-k-ratio must be a number"),
        (["--batch", "0"], "batch must be a positive integer"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, message, capsys):
    assert main(["plan", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_bytes_are_read_with_units():
    assert [parse_bytes(text) for text in ("1GiB", "2 GB", "3mib", "4")] == [2**30, 2 * 10**9, 3 * 2**20, 4]


def test_parts_of_unknown_names():
    assert model_sizes.part_of("model.language_model.norm.weight", {1}) == "other"
    assert SimpleNamespace(**model_sizes.weight_bytes(random_config())).lm_head > 0
