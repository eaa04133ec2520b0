"""Several questions about one picture: it goes through the tower once, and nothing else changes."""

import dataclasses

import pytest

from trim_plugin import open_picture
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.evaluation import Answer, AnswerLog, Question, evaluate, variants_for
from trim_plugin.evaluation.known import KnownPictures

TEXTS = ("Read all digits.", "How many digits are there?", "Which digit is red?")


@pytest.fixture(scope="module")
def loaded():
    return load_small_model()


@pytest.fixture
def calls(loaded):
    """The number of pictures in every call of the vision tower."""
    seen: list[int] = []
    handle = loaded[0].model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[:2].numel()), with_kwargs=True
    )
    yield seen
    handle.remove()


def without_time(answers):
    return [dataclasses.replace(answer, seconds=0.0) for answer in answers]


def test_answers_and_figures_are_the_same_and_the_tower_runs_once(loaded, calls, tmp_path):
    first, second, third = (example.picture for example in examples()[:3])
    questions = [Question(f"{n}", (first,), text) for n, text in enumerate(TEXTS)]
    questions += [Question(f"two {n}", (second, first), text) for n, text in enumerate(TEXTS[:2])]
    questions.append(Question("once", (third,), TEXTS[0]))
    ways, found, towers = variants_for([1.0, 0.1], shares=[0.25], stock=False), {}, {}
    for most_bytes in (0, 2**30):
        calls.clear()
        log = AnswerLog(tmp_path / str(most_bytes), {})
        evaluate(*loaded, questions, ways, log, max_new_tokens=6, encoded_bytes=most_bytes)
        found[most_bytes], towers[most_bytes] = without_time(log.answers()), sum(calls)
    assert found[0] == found[2**30]
    # Each of three ways is run once more to warm up; so is the first encoding.
    assert towers[0] == 3 * (3 + 2 * 2 + 1) + 3
    assert towers[2**30] == (1 + 1) + 1 + 3


def test_a_question_is_charged_its_part(loaded, monkeypatch):
    picture = examples()[0].picture
    questions = [Question(f"{n}", (picture,), text) for n, text in enumerate(TEXTS)]
    known = KnownPictures(*loaded, questions, 2**30)
    times = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr("trim_plugin.evaluation.known.time.perf_counter", lambda: next(times))
    assert known.of(questions[0], [open_picture(picture)]) is known.of(questions[1], [open_picture(picture)])
    answer = Answer("0", "exact", "two", seconds=0.5, new_tokens=1)
    assert [known.charged(question, answer).seconds for question in questions] == [1.5, 1.5, 1.5]


def test_nothing_is_encoded_where_nothing_is_gained(loaded, calls):
    one, other = (Question(name, (example.picture,), "?") for name, example in zip("ab", examples(), strict=False))
    assert KnownPictures(*loaded, [one, other], 2**30).of(one, []) is None
    assert KnownPictures(*loaded, [one, one], 0).of(one, []) is None
    assert calls == []
