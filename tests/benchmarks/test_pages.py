"""Printed pages, the questions about them, and how a model is trained to read them."""

import argparse
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.quality import measure as quality
from benchmarks.quality.rules import Rule
from benchmarks.small_model import fine
from benchmarks.small_model import train as trainer
from benchmarks.small_model.architecture import build_tokenizer
from benchmarks.small_model.batches import SceneBatches, image_inputs, patch_labels
from benchmarks.small_model.check import largest_differences
from benchmarks.small_model.evaluate import held_out_questions
from benchmarks.small_model.optimizer import muon
from benchmarks.small_model.pages.questions import TRAINED_TYPES, ask, training_questions
from benchmarks.small_model.pages.scenes import HELD_OUT_SIZE, LABELS, LAYOUTS, TRAIN_SIZES, draw_page
from benchmarks.small_model.parallel import run_together
from benchmarks.small_model.recipes import Recipe, Stage
from benchmarks.small_model.tasks import DIGITS, PAGES, folder_of, task_of
from benchmarks.small_model.thinned import chosen_tokens, thinned
from benchmarks.small_model.variants import COARSE, FINE

PRINTED = Recipe(
    FINE,
    (
        Stage("tower", 1, 1e-3, decay=1, warmup=1, tokens=120),
        Stage("reading", 2, 1e-3, decay=1, tokens=240, texts=True, frozen=True, repeats=2),
        Stage("questions", 1, 1e-3, decay=1, warmup=1, texts=True, crowded=True),
    ),
    batch=2,
    warm="fine",
    optimizer="muon",
    scenes="pages",
)


def test_the_page_of_a_seed_stays_what_it_was():
    page = draw_page(1, held_out=True, layout=(2, 2), lines=3)
    assert [(line.label, line.number) for line in page.lines] == [("pink", "872"), ("cyan", "167"), ("green", "93")]
    assert (page.image.size, page.size) == ((160, 160), 15)
    rng = np.random.default_rng(0)
    assert np.asarray(page.image).mean() == pytest.approx(30.78, abs=0.5)
    assert [ask(page, kind, rng) for kind in TRAINED_TYPES] == [
        ("What number is green?", "9 3"),
        ("Which name has 167?", "cyan"),
        ("What number is orange?", "none"),
        ("How many numbers are there?", "three"),
        ("Read all numbers.", "pink 8 7 2, cyan 1 6 7, green 9 3"),
    ]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**9), held_out=st.booleans(), layout=st.sampled_from([None, *LAYOUTS]))
def test_lines_stand_below_each_other_within_the_page_and_nothing_twice(seed, held_out, layout):
    page = draw_page(seed, held_out=held_out, layout=layout)
    assert layout in (None, page.layout)
    assert page.size in ((HELD_OUT_SIZE,) if held_out else TRAIN_SIZES)
    for names in ([line.label for line in page.lines], [line.number for line in page.lines]):
        assert len(set(names)) == len(names) <= 8
    assert all(re.fullmatch(r"0|[1-9]\d{0,2}", line.number) for line in page.lines)
    bottom = -1.0
    for line in page.lines:
        left, top, right, _ = line.label_box
        assert 0 <= left < right < line.digit_boxes[0][0]
        assert top > bottom - 1
        assert line.digit_boxes[-1][2] <= page.image.width
        bottom = line.label_box[3]
    assert bottom <= page.image.height
    again = draw_page(seed, held_out=held_out, layout=layout)
    assert again == dataclasses.replace(page, image=again.image)
    assert np.array_equal(np.asarray(again.image), np.asarray(page.image))


@pytest.mark.parametrize("seed", range(6))
def test_all_ink_lies_in_the_boxes(seed):
    page = draw_page(seed, held_out=False, layout=(2, 2), lines=5)
    picture = np.asarray(page.image, dtype=float).mean(axis=2)
    boxed = np.zeros(picture.shape, dtype=bool)
    for line in page.lines:
        for left, top, right, bottom in (line.label_box, *line.digit_boxes):
            boxed[int(top) : int(bottom) + 1, int(left) : int(right) + 2] = True
    paper = np.median(picture[~boxed])
    inked = abs(picture - paper) > 60
    assert inked[boxed].mean() > 0.1
    assert inked[~boxed].mean() < 0.002


def test_a_page_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match=r"lines must be 1 to 4 on 1 rows of tiles, got 5"):
        draw_page(0, held_out=True, layout=(1, 2), lines=5)
    with pytest.raises(ValueError, match=r"layout must be one of .* got \(3, 3\)"):
        draw_page(0, held_out=True, layout=(3, 3))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), held_out=st.booleans())
def test_answers_are_true_and_in_the_tokenizers_words(seed, held_out):
    page, rng, tokenizer = draw_page(seed, held_out=held_out), np.random.default_rng(seed), build_tokenizer()
    numbers = {line.label: " ".join(line.number) for line in page.lines}
    labels = {number.replace(" ", ""): label for label, number in numbers.items()}
    pairs = [(kind, *ask(page, kind, rng, vary=vary)) for kind in TRAINED_TYPES for vary in (False, True)]
    pairs += [("any", *pair) for pair in training_questions(page, rng)]
    for kind, question, answer in pairs:
        ids = tokenizer(question + " " + answer, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids) == answer
        words = re.findall(r"[a-z]+|\d+", question.lower())
        if subject := next((word for word in words if word in LABELS), None):
            assert answer == numbers.get(subject, "none")
        elif subject := next((word for word in words if word.isdigit()), None):
            assert answer == labels.get(subject, "none")
        elif words[0] in ("read", "list"):
            assert answer == ", ".join(f"{label} {number}" for label, number in numbers.items())
        else:
            assert answer == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"][len(numbers)]
        assert kind != "absent" or answer == "none"
        assert kind not in ("number", "label") or answer != "none"


def test_training_asks_for_the_whole_page_and_for_what_is_not_there():
    page = draw_page(5, held_out=False, layout=(2, 2), lines=7)
    asked = training_questions(page, np.random.default_rng(0))
    assert sum("," in answer for _, answer in asked) == 1
    assert sum(answer == "none" for _, answer in asked) == 2
    assert sum(answer in LABELS for _, answer in asked) == 6


@pytest.mark.parametrize("seed", range(4))
def test_patches_are_labelled_by_what_their_centre_lies_in(seed):
    page = draw_page(seed, held_out=False, layout=(2, 2), lines=6)
    labels = patch_labels(page, FINE).reshape(2, 2, 16, 16, 4).transpose(0, 2, 1, 3, 4).reshape(32, 32, 4)
    scale = 160 / page.image.height if page.image.height > page.image.width else 1
    assert scale == 1
    for row in range(32):
        for column in range(32):
            x, y, found = 5 * column + 2.5, 5 * row + 2.5, (0, 0, 0, 0)
            for number, line in enumerate(page.lines, start=1):
                word = LABELS.index(line.label) + 1
                boxes = [(line.label_box, 10 + word, 0)]
                for place, box in enumerate(line.digit_boxes):
                    boxes.append((box, int(line.number[place]) + 1, (0, 1, 2, 4)[len(line.number)] + place))
                for (left, top, right, bottom), glyph, place in boxes:
                    if left < x < right and top < y < bottom:
                        found = (glyph, place, number, word)
            assert tuple(labels[row, column]) == found, (row, column)


@pytest.fixture(scope="module")
def fine_vision():
    return fine.load()[0].model.vision_model


@pytest.mark.parametrize("layout", [(2, 2), (1, 2)])
def test_a_thinned_tower_reads_what_is_kept_and_nothing_else(layout, fine_vision):
    page = draw_page(2, held_out=False, layout=layout, lines=3)
    inputs = image_inputs([page.image], FINE.tile)
    kept = torch.from_numpy(chosen_tokens(patch_labels(page, FINE), 400, np.random.default_rng(0)))[None]
    left_out = next(token for token in range(1, 257) if token not in kept[0])
    changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    row, column = divmod(left_out - 1, 16)
    changed["pixel_values"][:, :, 0, :, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5] += 0.5
    with torch.no_grad():
        whole, moved = (fine_vision(**given).last_hidden_state[0, 0].flatten(0, 1) for given in (inputs, changed))
        with thinned(fine_vision, kept):
            some, same = (fine_vision(**given).last_hidden_state[0, 0].flatten(0, 1) for given in (inputs, changed))
        with thinned(fine_vision, None):
            assert torch.equal(fine_vision(**inputs).last_hidden_state[0, 0].flatten(0, 1), whole)
    assert torch.equal(some[kept[0]], same[kept[0]])
    assert not torch.equal(whole[kept[0]], moved[kept[0]])
    # The features behind a layer are the last 2 × 96 of 3 × 96; those of left-out tokens are zeros there.
    dropped = torch.ones(len(some), dtype=torch.bool).index_fill(0, kept[0], False)
    assert some[dropped][:, 96:].abs().max() == 0
    assert some[kept[0]].abs().sum(dim=1).min() > 0


def test_print_is_kept_before_empty_paper():
    page = draw_page(3, held_out=False, layout=(2, 2), lines=4)
    labels = patch_labels(page, FINE)
    shown = 1 + np.flatnonzero(np.pad(labels[:, :, 0] > 0, ((0, 0), (0, 1))).ravel())  # a class token before every tile
    kept = chosen_tokens(labels, 300, np.random.default_rng(0))
    assert len(set(kept)) == 300
    assert {0, 257, 514, 771} <= set(kept)
    assert set(shown) <= set(kept)
    few = chosen_tokens(labels, 60, np.random.default_rng(0))
    assert set(few) - set(shown) == {0, 257, 514, 771}


def test_training_on_pages_computes_what_processor_and_model_compute():
    pixels, logits = largest_differences(count=3, variant=FINE, task=PAGES)
    assert pixels < 1e-5
    assert logits < 1e-3


def test_processes_share_a_batch_without_overlap():
    whole = SceneBatches(PRINTED, PRINTED.stages[0], 2)[1]
    parts = [SceneBatches(PRINTED, PRINTED.stages[0], 2, part, 2)[1] for part in range(2)]
    assert [len(part["pixel_values"]) for part in parts] == [1, 1]
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), whole["pixel_values"])
    with pytest.raises(ValueError, match="a batch of 2 scenes can't be shared out equally to 3 processes"):
        SceneBatches(PRINTED, PRINTED.stages[0], 2, 0, 3)


def averaged(group, folder):
    parameters = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(4)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, 1.0 + group.rank)
    numbers = group.average(parameters, {"loss": 4.0 * group.rank})
    (folder / f"{group.rank}.json").write_text(
        json.dumps([numbers, *(p.grad.unique().tolist() for p in parameters[:2])])
    )
    if group.rank and (folder / "fail").exists():
        raise ValueError("on purpose")


@pytest.mark.slow
def test_processes_average_gradients_and_a_failure_is_not_lost(tmp_path):
    run_together(averaged, 2, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [{"loss": 2.0}, [1.5], [1.5]]
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="one of the training processes failed"):
        run_together(averaged, 2, tmp_path)


def test_muon_moves_all_directions_of_a_matrix_alike_and_the_rest_as_adamw_does():
    torch.manual_seed(0)
    encoder = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.Linear(6, 6)]), "head": torch.nn.Linear(6, 3)}
    )
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    optimizer = muon([encoder])
    reference = torch.nn.Linear(6, 3)
    reference.load_state_dict(encoder["head"].state_dict())
    matrices, others = [reference.weight], [reference.bias]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    for _ in range(3):
        for parameter in encoder.parameters():
            parameter.grad = torch.randn_like(parameter)
        reference.weight.grad, reference.bias.grad = (
            encoder["head"].weight.grad.clone(),
            encoder["head"].bias.grad.clone(),
        )
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(encoder["head"].state_dict(), reference.state_dict())
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = muon([encoder])
    encoder["layers"][0].weight.grad = torch.diag(torch.tensor([100.0, 1, 1, 1, 1, 0.5]))
    start = encoder["layers"][0].weight.detach() * (1 - 1e-3 * 0.05)
    optimizer.step()
    moved = torch.linalg.svdvals(encoder["layers"][0].weight.detach() - start) / (1e-3 * 10)
    assert 0.2 < moved.min() <= moved.max() < 1.3  # the gradient's differ by a factor of 200
    assert not torch.equal(before["layers.0.bias"], encoder["layers"][0].bias)


def weights(out):
    return load_file(out / "checkpoint" / "model.safetensors"), load_file(out / "state" / "state.safetensors")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    out = tmp_path_factory.mktemp("printed")
    trainer.train(PRINTED, out)
    return out


def test_a_run_on_pages_goes_on_to_the_same_weights(printed, tmp_path):
    stopped = trainer.train(PRINTED, tmp_path, limit=2)  # within the stage that repeats its readings
    assert stopped.progress.stages["reading"]["steps"] == 1
    trainer.train(PRINTED, tmp_path)
    for mine, whole in zip(weights(tmp_path), weights(printed), strict=True):
        assert mine.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(mine[name], tensor), name


def test_a_frozen_tower_stays_what_it_is(tmp_path):
    trainer.train(PRINTED, tmp_path, limit=1)
    before = weights(tmp_path)[1]
    trainer.train(PRINTED, tmp_path, limit=2)
    after = weights(tmp_path)[1]
    moved = {name for name, tensor in after.items() if name in before and not torch.equal(before[name], tensor)}
    assert any(name.startswith("model/model.language_model") for name in moved)
    assert not any(name.startswith(("model/model.vision_model", "head")) for name in moved)


def test_a_new_run_can_begin_with_a_checkpoint(printed, tmp_path):
    run = trainer.train(PRINTED.with_steps({"tower": 0}), tmp_path, limit=0, start=printed / "checkpoint")
    given = weights(printed)[0]
    assert all(torch.equal(given[name], tensor) for name, tensor in run.model.state_dict().items() if name in given)


def test_a_stage_without_meaning_is_an_error():
    with pytest.raises(ValueError, match="trains nothing: frozen=True needs texts=True"):
        Stage("tower", 1, 1.0, 1, frozen=True)
    with pytest.raises(ValueError, match="reads tiles apart or few tokens, not both: tokens=96"):
        Stage("tower", 1, 1.0, 1, tokens=96, together_every=4)
    with pytest.raises(ValueError, match="repeats=3 needs frozen=True"):
        Stage("questions", 1, 1.0, 1, texts=True, repeats=3)


def test_what_a_model_is_asked_about_is_written_beside_it(printed):
    assert task_of(printed / "checkpoint") is PAGES
    assert task_of(fine.MODEL) is DIGITS
    assert task_of(printed) is DIGITS  # says nothing
    assert folder_of("fine") == fine.MODEL
    questions = held_out_questions(10, seed=3, scale=FINE.scale, task=PAGES)
    assert [question.kind for question in questions] == [*TRAINED_TYPES, *TRAINED_TYPES]
    with pytest.raises(ValueError, match="tiles of 80 pixels, and this model has tiles of 40"):
        held_out_questions(1, scale=COARSE.scale, task=PAGES)


@pytest.mark.slow
def test_quality_on_pages_is_told_by_type(printed, tmp_path, monkeypatch):
    folder = tmp_path / "printed" / "model"
    shutil.copytree(printed / "checkpoint", folder)
    monkeypatch.setattr(quality.rules, "all_rules", lambda quick: [Rule("exact", 1.0, {"top_k_ratio": 1.0})])
    monkeypatch.setattr(quality, "conditions", lambda adapter: [])
    given = {"scenes": 3, "quick": False, "adapter": None, "model": folder, "resume": False, "positions": False}
    result = quality.run(argparse.Namespace(out=tmp_path, **given))
    assert result["model"] == "printed"
    assert (tmp_path / "quality-printed.json").exists()
    assert result["questions"] == 15
    for row in result["rows"]:
        assert list(row["by_type"]) == list(TRAINED_TYPES)
        assert all(part["agreement"] == 1.0 for part in row["by_type"].values())
