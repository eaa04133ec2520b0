"""Scenes, first weights and the trainer of the small models: a run that is cut off goes on as if it had not been."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.small_model import fine as fine_model
from benchmarks.small_model import train as trainer
from benchmarks.small_model.apart import tiles_apart
from benchmarks.small_model.architecture import build_config, build_model, build_tokenizer
from benchmarks.small_model.batches import image_inputs
from benchmarks.small_model.check import largest_differences
from benchmarks.small_model.evaluate import answers, batches, held_out_questions
from benchmarks.small_model.publish import publish
from benchmarks.small_model.questions import TRAINED_TYPES, ask
from benchmarks.small_model.recipes import RECIPES, Recipe, Stage
from benchmarks.small_model.scenes import draw_scene
from benchmarks.small_model.variants import COARSE, FINE, VARIANTS
from benchmarks.small_model.warm import fewer_heads, finer_positions, warm_start

RECIPE = Recipe(
    COARSE,
    (
        Stage("tower", 3, 1e-3, decay=1, warmup=2, together_every=0, bfloat16=True),
        Stage("mixed", 2, 1e-3, decay=1, texts=True, together_every=2),
        Stage("questions", 3, 1e-3, decay=2, warmup=2, texts=True, bfloat16=True, crowded=True, patch_weight=1.0),
    ),
    batch=2,
)


@pytest.fixture(scope="module")
def fine():
    return build_model(build_config(build_tokenizer(), FINE), seed=0).eval()


def test_the_coarse_scenes_of_a_seed_stay_what_they_were():
    scene = draw_scene(0, held_out=True)
    assert scene.image.size == (160, 40)
    assert [(d.value, d.colour) for d in scene.digits] == [
        (9, "green"), (5, "cyan"), (2, "blue"), (1, "pink"), (4, "white"),
    ]  # fmt: skip
    assert scene.digits[0].box == pytest.approx(
        (62.99222523207648, 22.61694677321345, 76.91542129848685, 36.54014283962381)
    )
    assert np.asarray(scene.image).mean() == pytest.approx(44.4179, abs=0.05)
    assert [ask(scene, kind, np.random.default_rng(0)) for kind in TRAINED_TYPES] == [
        ("Which digit is white?", "four"),
        ("How many digits are 4?", "one"),
        ("How many digits are there?", "five"),
        ("Which colour is the 4?", "white"),
        ("Read all digits.", "green nine, cyan five, blue two, pink one, white four"),
    ]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), held_out=st.booleans())
def test_a_finer_scene_shows_the_same_at_twice_the_size(seed, held_out):
    coarse = draw_scene(seed, held_out=held_out, augment=False)
    finer = draw_scene(seed, held_out=held_out, augment=False, scale=2)
    assert finer.layout == coarse.layout
    assert finer.image.size == (2 * coarse.image.width, 2 * coarse.image.height)
    assert [(d.value, d.colour) for d in finer.digits] == [(d.value, d.colour) for d in coarse.digits]
    for fine_digit, digit in zip(finer.digits, coarse.digits, strict=True):
        assert fine_digit.box == pytest.approx([2 * edge for edge in digit.box])
    small = np.asarray(finer.image.reduce(2), dtype=float)
    assert np.corrcoef(small.ravel(), np.asarray(coarse.image, dtype=float).ravel())[0, 1] > 0.7


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_training_computes_what_processor_and_model_compute(variant):
    pixels, logits = largest_differences(count=3, variant=variant)
    assert pixels < 1e-5
    assert logits < 1e-3


def test_apart_no_tile_reads_another_one(fine):
    vision = fine.model.vision_model
    inputs = image_inputs([draw_scene(0, held_out=False, layout=(2, 2), scale=2, augment=False).image], FINE.tile)
    changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:, :, 1] += 0.5
    with torch.no_grad():
        with tiles_apart(vision):
            before, after = (vision(**given).last_hidden_state[0, 0] for given in (inputs, changed))
        together = [vision(**given).last_hidden_state[0, 0] for given in (inputs, changed)]
    moved = (after - before).abs().amax((1, 2))
    assert moved[1] > 0.1
    assert moved[[0, 2, 3]].max() == 0
    assert (together[1] - together[0]).abs().amax((1, 2)).min() > 1e-4


def test_finer_positions_lie_between_the_coarse_ones():
    ys, xs = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    coarse = torch.cat([torch.tensor([[7.0, 9.0]]), torch.stack([ys.flatten(), xs.flatten()], 1)])
    finer = finer_positions(coarse, 65)
    assert finer[0].tolist() == [7.0, 9.0]
    inner = finer[1:].reshape(8, 8, 2)[1:-1, 1:-1]  # the outermost have no neighbour to lie between
    expected = torch.arange(8) / 2 - 0.25
    torch.testing.assert_close(inner[..., 0], expected[1:-1, None].expand(6, 6))
    torch.testing.assert_close(inner[..., 1], expected[None, 1:-1].expand(6, 6))


def test_fewer_heads_are_the_means_of_their_groups():
    heads = torch.arange(8.0).repeat_interleave(16)[:, None].expand(128, 5)
    assert fewer_heads(heads, 32)[::16, 0].tolist() == [1.5, 5.5]


def test_a_warm_start_copies_what_fits_and_fills_the_rest(fine):
    coarse = build_model(build_config(build_tokenizer(), COARSE), seed=1)
    model = build_model(build_config(build_tokenizer(), FINE), seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    warm_start(model, coarse)
    given = coarse.state_dict()
    for name, weight in model.state_dict().items():
        if weight.shape == given[name].shape:
            assert torch.equal(weight, given[name]), name
        else:
            assert not torch.equal(weight, before[name]), name


def run(out, **options):
    return trainer.train(RECIPE, out, **options)


def weights(out):
    return load_file(out / "checkpoint" / "model.safetensors"), load_file(out / "state" / "state.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.mark.parametrize(
    "steps",
    [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)],
    ids=["within the tower", "between the stages", "within the questions"],
)
def test_stopped_and_resumed_gives_the_weights_of_an_uninterrupted_run(steps, uninterrupted, tmp_path):
    stopped = run(tmp_path, limit=steps)
    assert sum(stage["steps"] for stage in stopped.progress.stages.values()) == steps
    resumed = run(tmp_path)
    assert resumed.resumed
    for mine, whole in zip(weights(tmp_path), weights(uninterrupted), strict=True):
        assert mine.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(mine[name], tensor), name
    progress = [json.loads((out / "state" / "progress.json").read_text()) for out in (tmp_path, uninterrupted)]
    assert progress[0]["smooth"] == progress[1]["smooth"]


def test_killed_within_a_step_goes_on_from_what_was_written(uninterrupted, tmp_path, monkeypatch):
    true_average, calls = trainer.average, []

    def killed(target, source, step):
        calls.append(step)
        if len(calls) == 7:  # the second of the questions: the model has moved, nothing of it is written
            raise KeyboardInterrupt
        true_average(target, source, step)

    monkeypatch.setattr(trainer, "average", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, save_every_s=0)
    monkeypatch.setattr(trainer, "average", true_average)
    run(tmp_path)
    for mine, whole in zip(weights(tmp_path), weights(uninterrupted), strict=True):
        for name, tensor in whole.items():
            assert torch.equal(mine[name], tensor), name


def test_asked_to_end_it_writes_the_step_it_is_in(uninterrupted, tmp_path, monkeypatch):
    true_average = trainer.average

    def terminated(target, source, step):
        true_average(target, source, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "average", terminated)
    assert run(tmp_path).progress.stages == {"tower": run_stages(tmp_path)["tower"]}
    assert run_stages(tmp_path)["tower"]["steps"] == 2
    monkeypatch.setattr(trainer, "average", true_average)
    run(tmp_path)
    for name, tensor in weights(uninterrupted)[0].items():
        assert torch.equal(weights(tmp_path)[0][name], tensor), name


def run_stages(out):
    return json.loads((out / "state" / "progress.json").read_text())["stages"]


def test_a_plateau_ends_a_stage_after_its_decay(tmp_path):
    stage = Stage("tower", 50, 0.0, decay=2, warmup=1, window=2, gain=1.1)  # no gain is that large
    progress = trainer.train(Recipe(COARSE, (stage,), batch=1), tmp_path, limit=20).progress
    assert progress.stages["tower"]["steps"] == 6  # two windows of two steps, and the decay


def test_stages_of_one_kind_share_no_batch():
    assert [RECIPE.first_batch(index) for index in range(3)] == [0, 0, 2]


def test_tiles_read_each_other_in_every_so_manieth_step():
    flags = {
        every: [Stage("tower", 6, 1.0, 1, together_every=every).apart(step) for step in range(6)] for every in (0, 1, 3)
    }
    assert flags == {0: [True] * 6, 1: [False] * 6, 3: [False, True, True] * 2}


def test_the_rate_rises_stays_and_falls():
    stage = Stage("tower", 100, 1.0, decay=20, warmup=10)
    factors = [stage.factor(step, 80) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:81] == pytest.approx([1.0] * 71)
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert factors[100] == pytest.approx(0.01)


def test_steps_of_a_stage_that_does_not_exist_are_an_error():
    with pytest.raises(ValueError, match=r"no such stages.*twoer.*tower"):
        RECIPES["fine"].with_steps({"twoer": 3})
    assert RECIPES["fine"].with_steps({"tower": 3}).stages[0] == dataclasses.replace(
        RECIPES["fine"].stages[0], steps=3, decay=3
    )


def test_the_fine_model_reads_scenes_that_it_has_not_seen():
    model, processor = fine_model.load()
    questions = held_out_questions(20, seed=9, scale=FINE.scale)
    right = 0
    for part, inputs in batches(processor, questions, 10):
        assert inputs["pixel_values"].shape[-1] == FINE.tile
        texts, _ = answers(model, processor, inputs)
        right += sum(text == question.answer for text, question in zip(texts, part, strict=True))
    assert right >= 12  # guesses are right on two or three


def test_publishing_copies_the_checkpoint_and_draws_the_curve(uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    progress = json.loads((out / "state" / "progress.json").read_text())
    progress["curve"] = [
        {"stage": "tower", "steps": 20, "minutes": 1.0, "patches": 0.1},
        {"stage": "tower", "steps": 40, "minutes": 2.0, "patches": 0.2},
        {"stage": "questions", "steps": 20, "minutes": 1.0, "patches": 0.3, "words": 0.5},
    ]
    (out / "state" / "progress.json").write_text(json.dumps(progress))
    publish(out, tmp_path / "there")
    published = load_file(tmp_path / "there" / "model" / "model.safetensors")
    assert published.keys() == weights(uninterrupted)[0].keys()
    assert json.loads((tmp_path / "there" / "results" / "curve.json").read_text()) == progress["curve"]
    assert (tmp_path / "there" / "results" / "curve.png").stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no training run"):
        publish(tmp_path / "nowhere", tmp_path / "there")


def test_weights_that_are_too_large_are_not_published(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.small_model.publish.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="bytes, more than 1,000"):
        publish(uninterrupted, tmp_path)
    assert list(tmp_path.iterdir()) == []
