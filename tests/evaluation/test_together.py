"""Many questions at once: everything is answered and counted as it is alone, and the times say that they are shares."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from trim_plugin.embedded import examples
from trim_plugin.evaluation import AnswerLog, Question, Variant, evaluate, variants_for

EXAMPLES = examples()
PICTURES = [example.picture for example in EXAMPLES]
CHAT = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": EXAMPLES[0].question}]},
    {"role": "assistant", "content": [{"type": "text", "text": EXAMPLES[0].answer}]},
    {"role": "user", "content": [{"type": "text", "text": "Read all digits."}]},
)


@pytest.fixture
def calls(small):
    """The number of pictures in every call of the vision tower."""
    seen: list[int] = []
    handle = small[0].model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[:2].numel()), with_kwargs=True
    )
    yield seen
    handle.remove()


def answers(small, folder, questions, variants, **settings):
    """What is logged, by question and variant."""
    log = AnswerLog(folder, {})
    evaluate(*small, questions, variants, log, max_new_tokens=5, **settings)
    return {(answer.question, answer.way): answer for answer in log.answers()}


def without_time(found):
    return {name: dataclasses.replace(answer, seconds=0.0, at_once=1) for name, answer in found.items()}


def mixed(number):
    """Questions about none to three pictures, a chat among them, of unequal lengths."""
    asked = [
        Question(
            str(place),
            tuple(PICTURES[(place + more) % len(PICTURES)] for more in range(place % 4)),
            EXAMPLES[place % len(EXAMPLES)].question,
            max_new_tokens=1 + 3 * place if place % 3 else None,
        )
        for place in range(number)
    ]
    return [*asked, Question("chat", PICTURES[:1], "Read all digits.", messages=CHAT, max_new_tokens=12)]


def test_answers_and_figures_are_those_of_each_question_alone(small, tmp_path):
    variants = [
        *variants_for([1.0, 0.2], shares=[0.3]),
        *variants_for([0.3], "int8", merge=False, stock=False),
        *variants_for([0.5], tower_share=0.6, stock=False),
    ]
    questions = mixed(7)
    alone = answers(small, tmp_path / "alone", questions, variants, max_running=1)
    many = answers(small, tmp_path / "many", questions, variants, max_running=4)
    assert not any(answer.error for answer in alone.values())
    assert without_time(many) == without_time(alone)
    assert {answer.at_once for answer in alone.values()} == {1}
    assert {way: answer.at_once for (_, way), answer in many.items()} == {
        variant.name: 1 if variant.stock else 4 for variant in variants
    }
    assert len(alone) == len(variants) * len(questions)
    assert {answer.kept != "" for (_, way), answer in many.items() if way != "stock"} == {True, False}  # no picture


def test_the_time_of_all_is_shared_out(small, tmp_path):
    start = time.perf_counter()
    found = answers(small, tmp_path, mixed(6), variants_for([0.3], stock=False), max_running=3)
    took = time.perf_counter() - start
    seconds = [answer.seconds for answer in found.values()]
    assert min(seconds) > 0
    assert 0.5 * took < sum(seconds) < took


def test_a_picture_goes_through_the_tower_once_for_all_that_ask_about_it(small, calls, tmp_path):
    questions = [
        Question(name, PICTURES[:1], text) for name, text in zip("abc", ("One?", "Two?", "Three?"), strict=True)
    ]
    questions.append(Question("two", (PICTURES[1], PICTURES[0]), "Which?"))
    variants = variants_for([1.0], shares=[0.2], stock=False)
    answers(small, tmp_path / "many", questions, variants)
    assert sum(calls) == 2 * len(variants)
    calls.clear()
    answers(small, tmp_path / "alone", questions, variants, max_running=1)
    assert sum(calls) == (5 + 1) * len(variants)  # one more to warm up, and nothing is shared: times compare


def test_what_no_engine_can_have_is_answered_alone(small, tmp_path):
    variants = [Variant("growing", {"top_k_ratio": 0.3}), Variant("fixed", {"top_k_ratio": 0.3, "static": True})]
    questions = [Question("a", PICTURES[:1], EXAMPLES[0].question)]
    found = answers(small, tmp_path, questions, variants)
    assert {way: answer.at_once for (_, way), answer in found.items()} == {"growing": 32, "fixed": 1}
    assert found["a", "growing"].text == found["a", "fixed"].text


@pytest.mark.parametrize(("name", "value", "at_once"), [("min_new_tokens", 4, 1), ("repetition_penalty", 1.0, 4)])
def test_what_a_model_asks_for_beyond_greedy_holds_for_every_variant(
    small, tmp_path, monkeypatch, name, value, at_once
):
    monkeypatch.setattr(small[0].generation_config, name, value)
    questions = [Question(str(place), PICTURES[place : place + 1], EXAMPLES[place].question) for place in range(3)]
    found = answers(small, tmp_path, questions, variants_for([1.0]), max_running=4)
    assert {answer.at_once for (_, way), answer in found.items() if way == "exact"} == {at_once}
    for (question, way), answer in found.items():
        assert answer.text == found[question, "stock"].text, way


def test_a_question_that_fails_is_its_own_error(small, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    questions = [
        Question("good", PICTURES[:1], EXAMPLES[0].question),
        Question("broken", (tmp_path / "text.png",), "What?"),
        Question("long", PICTURES[:1], "What? " * 2000),
        Question("beyond", PICTURES[:3], "What?", max_new_tokens=100),
    ]
    found = answers(small, tmp_path / "log", questions, variants_for([1.0]), memory=700_000)
    errors = {name: answer.error for name, answer in found.items() if answer.error}
    assert not found["good", "exact"].error
    assert not found["beyond", "stock"].error
    for way in ("stock", "exact"):
        assert "cannot read" in errors.pop(("broken", way))
        assert "the model reads" in errors.pop(("long", way))
    assert "may take" in errors.pop(("beyond", "exact"))
    assert not errors


def test_an_interruption_loses_and_doubles_nothing(small, tmp_path):
    questions, variants = mixed(6), variants_for([0.3, 0.1], stock=False)
    expected = without_time(answers(small, tmp_path / "whole", questions, variants))
    seen = []

    def stop(answer):
        seen.append((answer.question, answer.way))
        if len(seen) % 3 == 0:
            raise KeyboardInterrupt

    for _ in range(20):
        try:
            found = answers(small, tmp_path / "log", questions, variants, max_running=2, on_answer=stop)
            break
        except KeyboardInterrupt:
            assert not [thread for thread in threading.enumerate() if thread.name == "trim_plugin-engine"]
    assert len(seen) == len(set(seen)) == len(questions) * len(variants)
    assert without_time(found) == expected


def test_numbers_are_checked_before_any_work(small, tmp_path):
    log = AnswerLog(tmp_path, {})
    for name in ("max_running", "memory"):
        for wrong in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
                evaluate(*small, mixed(1), variants_for([0.3]), log, **{name: wrong})
    assert log.answers() == []


def test_a_variant_of_which_all_questions_fail_alike_is_given_up_and_the_others_go_on(small, tmp_path):
    """A mistake in code that one of them meets: its other questions need not fail of it, one by one."""

    class Odd:
        needs_states = True

        def __call__(self, *args):
            calls.append(1)
            raise KeyError("odd")

    calls: list[int] = []
    variants = [Variant("odd", {"processors": [Odd()]}), Variant("plain", {"top_k_ratio": 0.3})]
    questions = [Question(str(place), PICTURES[:1], f"Read digit {place}.") for place in range(100)]
    found = answers(small, tmp_path, questions, variants, max_running=2)
    assert not any(found[question.name, "plain"].error for question in questions)
    errors = [found[question.name, "odd"].error for question in questions]
    assert all("KeyError: 'odd'" in error for error in errors)
    assert "16 rows in a row have failed alike" in errors[-1]
    assert len(calls) < 60


@pytest.mark.parametrize("running", [1, 4])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("too long for this device"), "too long for this device"),
        (KeyError("odd"), "KeyError: 'odd'"),
        (ZeroDivisionError("odd"), "ZeroDivisionError: odd"),
    ],
)
def test_a_failing_forward_is_its_questions_error(small, tmp_path, running, error, said):
    def fail(module, args, kwargs):
        if kwargs["position_ids"].shape[-1] > 30:
            raise error

    handle = small[0].model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    questions = [Question(name, PICTURES[:1], text) for name, text in (("a", "How many? " * 20), ("b", "How many?"))]
    try:
        found = answers(small, tmp_path, questions, variants_for([0.3], stock=False), max_running=running)
    finally:
        handle.remove()
    assert {name: answer.error for (name, _), answer in found.items()} == {"a": said, "b": ""}
