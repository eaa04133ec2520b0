"""Requests that run together are answered as each would be alone, whatever comes and goes meanwhile."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trim_plugin import Engine, KCenter, TopPPerHead, TrimConfig, TrimmedCache, encode_pictures, prefill
from trim_plugin.arithmetic import tile_tokens
from trim_plugin.asking.answers import Inputs
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.embedded import ask, examples
from trim_plugin.engine.memory import Room
from trim_plugin.engine.request import Sampling
from trim_plugin.pictures.prompting import open_picture, written

EXAMPLES = examples()
PICTURES = [example.picture for example in EXAMPLES]
CONFIG = TrimConfig(top_k_ratio=0.3)


def alone(small, question, pictures, config=CONFIG, new=12):
    """Greedy tokens of `generate`."""
    model, processor = small
    prompt = written(processor, question, len(pictures))
    inputs = Inputs.of(processor, [prompt], [[open_picture(picture) for picture in pictures]])
    output = model.generate(**inputs.arguments(model, config), max_new_tokens=new, do_sample=False)
    return output[0, inputs.tensors["input_ids"].shape[1] :].tolist()


def jobs(number, seed):
    """Questions, pictures (none to three) and lengths."""
    draw = random.Random(seed)
    return [
        (
            draw.choice([draw.choice(EXAMPLES).question, "Read all digits.", "digit colour"]),
            [draw.choice(PICTURES) for _ in range(draw.choice([0, 1, 1, 2, 3]))],
            draw.randint(1, 14),
        )
        for _ in range(number)
    ]


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([CONFIG, TrimConfig(top_k_ratio=1.0), TrimConfig(processors=[KCenter(0.3)])]),
)
def test_every_request_is_answered_as_alone(small, seed, running, config):
    """Random arrivals and lengths, none to three pictures, cancellations, and requests that draw, which have their own seed."""
    model, processor = small
    draw, asked = random.Random(seed), jobs(10, seed)
    expected = [alone(small, question, pictures, config, new) for question, pictures, new in asked]
    with Engine(model, processor, config, max_running=running) as engine:
        requests, others = [], []
        for question, pictures, new in asked:
            requests.append(engine.submit(question, images=pictures, max_new_tokens=new))
            if draw.random() < 0.4:
                others.append(engine.submit(question, images=pictures[:1], max_new_tokens=30, temperature=1.0, seed=3))
            if others and draw.random() < 0.5:
                others.pop().cancel()
            time.sleep(draw.choice([0, 0, 0.02]))
        answers = [request.result(timeout=120) for request in requests]
    assert [answer.tokens for answer in answers] == expected
    for (_, pictures, new), answer in zip(asked, answers, strict=True):
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in ends(model) else "length")
        assert len(answer.tokens) <= new
        assert (answer.kept == 0) is (not pictures)


def ends(model):
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found}


def test_a_seed_gives_the_same_text_in_any_company(small):
    model, processor = small
    settings = {"temperature": 1.2, "top_p": 0.95, "top_k": 20, "max_new_tokens": 12}
    question, picture = "Read all digits.", PICTURES[0]
    with Engine(model, processor, CONFIG) as engine:
        first = engine.submit(question, images=[picture], seed=7, **settings).result().tokens
        crowd = [engine.submit(question, images=[one], seed=number, **settings) for number, one in enumerate(PICTURES)]
        again = [engine.submit(question, images=[picture], seed=7, **settings) for _ in range(2)]
        torch.manual_seed(5)  # a global seed belongs to others
        assert [request.result().tokens for request in again] == [first, first]
        texts = {tuple(request.result().tokens) for request in crowd}
    assert len(texts) > 1


def test_text_comes_as_it_is_written_and_stops_are_cut_off(small):
    model, processor = small
    with Engine(model, processor, CONFIG) as engine:
        whole = engine.submit(EXAMPLES[0].question, images=[PICTURES[0]], max_new_tokens=20)
        pieces = list(whole)
        text = whole.result().text
        assert "".join(pieces) == text
        words = engine.submit("Read all digits.", images=[PICTURES[1]], max_new_tokens=30).result().text
        stop = words.split()[1]
        cut = engine.submit("Read all digits.", images=[PICTURES[1]], max_new_tokens=30, stop=[stop])
        sent = "".join(cut)
        answer = cut.result()
    assert answer.finish_reason == "stop"
    assert sent == answer.text == words[: words.index(stop)]


def test_encoded_pictures_and_conversations(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [PICTURES[0]], rule=KCenter(0.25))
    inputs = pictures.inputs(processor, EXAMPLES[0].question)
    cache = TrimmedCache(model, CONFIG, pictures=pictures)
    expected = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=8, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": EXAMPLES[0].question}]},
        {"role": "assistant", "content": [{"type": "text", "text": EXAMPLES[0].answer}]},
        {"role": "user", "content": [{"type": "text", "text": "Read all digits."}]},
    ]
    with Engine(model, processor, CONFIG) as engine:
        encoded = engine.submit(EXAMPLES[0].question, pictures=pictures, max_new_tokens=8)
        talk = engine.submit(messages, images=[PICTURES[0]], max_new_tokens=8)
        assert encoded.result().tokens == expected.tolist()
        assert talk.result().text


def test_a_picture_that_several_ask_about_is_read_once(small):
    model, processor = small
    read = []
    handle = model.model.vision_model.register_forward_pre_hook(lambda *_: read.append(1))
    try:
        with Engine(model, processor, CONFIG) as engine:
            for request in [engine.submit(one.question, images=[PICTURES[0]], max_new_tokens=4) for one in EXAMPLES]:
                request.result()
            stats = engine.stats()
    finally:
        handle.remove()
    assert len(read) == stats["pictures_encoded"] == 1
    assert stats["pictures_reused"] == len(EXAMPLES) - 1


def test_what_is_held_is_told_as_of_each_alone(small):
    model, processor = small
    asked = [(one.question, PICTURES[:count]) for one, count in zip(EXAMPLES, (1, 0, 3, 1, 2), strict=False)]
    for config in (CONFIG, TrimConfig(top_k_ratio=1.0), TrimConfig(processors=[KCenter(0.2)], kv_quantization="int8")):
        with Engine(model, processor, config) as engine:
            requests = [engine.submit(q, images=own, max_new_tokens=3, tell_held=True) for q, own in asked]
            silent = engine.submit(*asked[0], max_new_tokens=3)
            for (question, own), request in zip(asked, requests, strict=True):
                prompt = written(processor, question, len(own))
                inputs = Inputs.of(processor, [prompt], [[open_picture(picture) for picture in own]])
                arguments = inputs.arguments(model, config)
                output = model.generate(**arguments, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
                cache, told = cache_of(output), request.result().held
                report = cache.report()
                assert told.kept_indices == cache.kept_indices[0].tolist()
                assert told.total_tokens == report.total_tokens[0]
                assert told.cross_kv_bytes == report.cross_kv_bytes
                assert told.stock_cross_kv_bytes == report.stock_cross_kv_bytes
            assert silent.result().held is None


WRONG = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
    ({"max_new_tokens": 10**6}, ValueError, "reads .* at most"),
    ({"temperature": -1}, ValueError, r"temperature must be a number in \[0, 2\]"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number"),
    ({"top_p": 0}, ValueError, "top_p must be a number in"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1"),
    ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ({"stop": [3]}, TypeError, "stop must be a text"),
    ({"beams": 4}, TypeError, "unknown setting 'beams'"),
    ({"images": ["nowhere.png"]}, ValueError, "no such picture"),
    ({"cache_config": {"static": True}}, ValueError, "'static' is the engine's"),
    ({"cache_config": {"kept_share": 0.1, "top_k_ratio": 0.1}}, ValueError, "both given"),
    ({"cache_config": {"kept_share": 2}}, ValueError, "kept_share must be a number in"),
]


@pytest.mark.parametrize(("given_settings", "error", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_said_at_once(small, given_settings, error, said):
    with Engine(*small, CONFIG) as engine:
        with pytest.raises(error, match=said):
            engine.submit("How many?", **given_settings)
        assert engine.submit("How many?", max_new_tokens=1).result().tokens


def test_settings_of_the_engine_are_checked(small):
    for wrong in ({"static": True, "max_cache_len": 64}, {"self_kv_quantization": "fp8"}):
        with pytest.raises(ValueError, match="batch grows and shrinks"):
            Engine(*small, wrong)
    for name in ("memory", "max_running"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
            Engine(*small, CONFIG, **{name: 0})
    with pytest.raises(TypeError, match="must be"):
        Sampling(max_new_tokens="9")


def test_requests_wait_for_room_and_those_that_never_fit_are_refused(small):
    model, processor = small
    asked = jobs(8, 1)
    expected = [alone(small, *one[:2], CONFIG, one[2]) for one in asked]
    with Engine(model, processor, CONFIG) as engine:
        needed = max(engine.submit(q, images=p, max_new_tokens=n).needed for q, p, n in asked)
    with Engine(model, processor, CONFIG, memory=2 * needed) as engine:
        requests, most = [engine.submit(q, images=p, max_new_tokens=n) for q, p, n in asked], 0
        while not all(request.done for request in requests):
            most = max(most, engine.stats()["running"])
            time.sleep(0.001)  # the engine's thread needs the interpreter, too
        assert 1 < most < len(asked)
        assert [request.result().tokens for request in requests] == expected
    refused = pytest.raises(ValueError, match=r"may take .* bytes of keys and values, but the engine has 1000")
    with Engine(model, processor, CONFIG, memory=1000) as engine, refused:
        engine.submit("How many?", images=PICTURES[:3], max_new_tokens=40)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("broken"), SystemExit(3)]
)
def test_a_failure_takes_nobody_with_it_that_is_not_running(small, error):
    model, processor = small
    expected = alone(small, EXAMPLES[0].question, [PICTURES[0]])
    fail = threading.Event()

    def failing(*_):
        if fail.is_set():
            fail.clear()
            raise error

    handle = model.model.language_model.layers[1].register_forward_pre_hook(failing)
    try:
        with Engine(model, processor, CONFIG) as engine:
            fail.set()
            first = engine.submit(EXAMPLES[0].question, images=[PICTURES[0]], max_new_tokens=12)
            with pytest.raises(type(error)):
                first.result(timeout=60)
            assert engine.healthy
            assert (
                engine.submit(EXAMPLES[0].question, images=[PICTURES[0]], max_new_tokens=12).result().tokens == expected
            )
    finally:
        handle.remove()


def test_the_newest_are_read_again_when_memory_is_full(small):
    """A step that runs out of memory, twice: nothing is lost, nothing is sent twice."""
    model, processor = small
    asked = jobs(6, 3)
    expected = [alone(small, *one[:2], CONFIG, one[2]) for one in asked]
    steps = []

    def failing(_layer, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1 and len(hidden) > 1:
            steps.append(1)
            if len(steps) in (1, 2):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    handle = model.model.language_model.layers[2].register_forward_pre_hook(failing, with_kwargs=True)
    try:
        with Engine(model, processor, CONFIG) as engine:
            requests = [engine.submit(q, images=p, max_new_tokens=n) for q, p, n in asked]
            texts = ["".join(request) for request in requests]
            answers = [request.result(timeout=60) for request in requests]
            assert engine.stats()["read_again"] >= 1
    finally:
        handle.remove()
    assert [answer.tokens for answer in answers] == expected
    assert texts == [answer.text for answer in answers]


@pytest.mark.parametrize(
    "config", [{}, {"processors": [KCenter(0.1)]}, {"processors": [TopPPerHead(1.0), KCenter(0.2)]}]
)
def test_what_a_share_will_keep_is_known_to_the_token(small, config):
    model, processor = small
    cache = TrimmedCache(model, config)
    prefill(model, cache, **ask(processor, picture=PICTURES[0]))
    report, room = cache.report(), Room(model, cache.config, None)
    tiles = report.visible_tokens[0] // tile_tokens(model.config.vision_config)
    assert room.kept_bytes(report.kept_tokens[0]) == report.cross_kv_bytes
    assert room.kept_bytes(report.kept_tokens[0] - 1) <= room.visual_bytes(tiles) <= report.cross_kv_bytes


@pytest.mark.parametrize("rule", [None, KCenter(0.25)], ids=str)
def test_what_encoded_pictures_will_keep_is_counted_by_what_they_hold(small, rule):
    model, processor = small
    pictures = encode_pictures(model, processor, [PICTURES[0]], rule=rule)
    cache = TrimmedCache(model, pictures=pictures)
    prefill(model, cache, **pictures.inputs(processor, "Read all digits."))
    kept, room = cache.report().kept_tokens[0], Room(model, cache.config, None)
    expected = room.visual_bytes(sum(pictures.tiles), encoded=len(pictures.index))
    assert room.kept_bytes(kept - 1) <= expected <= room.kept_bytes(kept)
    with Engine(model, processor, memory=room.text_bytes(80) + expected) as engine:
        assert engine.submit("Read all digits.", pictures=pictures, max_new_tokens=2).result(60).tokens


def test_room_is_kept_for_what_a_request_asks_for_itself(small):
    model, processor = small
    room = Room(model, TrimConfig(), None)
    text = room.text_bytes(80)
    for config, own, answered in (
        (None, {"top_k_ratio": 1.0}, False),  # would hold nearly three times what the engine's rule does
        (None, {"top_k_ratio": 0.05}, True),
        ({"top_k_ratio": 1.0}, {"top_k_ratio": 0.05}, True),
        ({"top_k_ratio": 1.0}, None, False),
    ):
        with Engine(model, processor, config, memory=text + room.visual_bytes(4)) as engine:
            four_tiles = {"images": [PICTURES[0]] * 4, "cache_config": own, "max_new_tokens": 2}
            if answered:
                assert engine.submit("Read all digits.", **four_tiles).result(60).tokens
            else:
                with pytest.raises(ValueError, match="the engine has"):
                    engine.submit("Read all digits.", **four_tiles)


@pytest.mark.parametrize("rule", [{"processors": [KCenter(0.1)]}, {"top_k_ratio": 1.0}, {"top_k_ratio": 0.3}], ids=str)
def test_a_request_that_writes_none_asks_for_nothing(small, rule):
    with Engine(*small, rule) as engine:
        kept = [
            engine.submit("Read all digits.", images=PICTURES[:1], cache_config=own, max_new_tokens=2).result(60).kept
            for own in (None, {"top_k_ratio": None}, {"top_k_ratio": None, "merge": False})
        ]
    assert len(set(kept)) == 1


@pytest.mark.parametrize("rule", [{}, {"processors": [TopPPerHead(0.5)]}, {"top_k_ratio": 1.0}], ids=str)
def test_a_request_may_keep_another_share_by_the_default_rule(small, rule):
    model, processor = small
    expected = TrimmedCache(model, {"processors": [KCenter(0.2)]})
    prefill(model, expected, **ask(processor, "Read all digits.", PICTURES[0]))
    with Engine(model, processor, rule) as engine:
        own = {"kept_share": 0.2, "top_k_ratio": None}
        answer = engine.submit("Read all digits.", images=PICTURES[:1], cache_config=own, max_new_tokens=2).result(60)
        assert answer.kept == expected.report().kept_tokens[0]
        plain = engine.submit("Read all digits.", images=PICTURES[:1], max_new_tokens=2).result(60)
        assert plain.kept != answer.kept
