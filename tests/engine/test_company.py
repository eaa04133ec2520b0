"""Any mix of requests, settings, arrivals, cancellations and failures: each is answered as alone.

The reference knows nothing of the engine: `generate` with one request, whose next token a restatement of the settings chooses.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from trim_plugin import Engine, KCenter, Pictures, TrimConfig, TrimmedCache, encode_pictures
from trim_plugin.asking.answers import Inputs
from trim_plugin.compat import CACHE
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.pictures.prompting import open_picture, written

EXAMPLES = examples()
PICTURES = [open_picture(example.picture) for example in EXAMPLES]
CONFIG = TrimConfig(top_k_ratio=0.3)


class OneByOne(LogitsProcessor):
    """Leaves the one token that the settings choose, written down from their definitions."""

    def __init__(self, settings: dict[str, Any], prompt: int) -> None:
        self.settings, self.prompt = settings, prompt
        self.generator = torch.Generator().manual_seed(settings.get("seed") or 0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits, given = scores[0].float().clone(), self.settings
        seen, own = input_ids[0].tolist(), input_ids[0, self.prompt :].tolist()
        for token in {token for token in seen if token < len(logits)}:
            factor = given.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(own):
            logits[token] -= given.get("frequency_penalty", 0.0) * own.count(token)
            logits[token] -= given.get("presence_penalty", 0.0)
        token = int(logits.argmax()) if not given.get("temperature") else self.drawn(logits)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, token] = 0
        return chosen

    def drawn(self, logits: torch.Tensor) -> int:
        given = self.settings
        logits = logits / given["temperature"]
        if given.get("top_k"):
            logits[logits < logits.topk(given["top_k"]).values[-1]] = -torch.inf
        if given.get("top_p", 1.0) < 1.0:
            ordered, places = logits.softmax(dim=0).sort()
            logits[places[:-1][ordered.cumsum(dim=0)[:-1] <= 1 - given["top_p"]]] = -torch.inf
        if given.get("min_p"):
            shares = logits.softmax(dim=0)
            logits[shares < given["min_p"] * shares.max()] = -torch.inf
        return int(torch.multinomial(logits.softmax(dim=0), 1, generator=self.generator))


@dataclasses.dataclass
class Asked:
    """A request: what is asked, about what, how, and what it gives alone."""

    question: Any
    images: list[Any]
    settings: dict[str, Any]
    encoded: Pictures | None = None
    expected: list[int] = dataclasses.field(default_factory=list)

    def submit(self, engine: Engine) -> Any:
        about = {"images": self.images} if self.encoded is None else {"pictures": self.encoded}
        return engine.submit(self.question, **about, **self.settings)


def alone(small, asked: Asked, config: TrimConfig) -> list[int]:
    """Its tokens, cut where a text of `stop` is complete."""
    model, processor = small
    settings = asked.settings
    prompt = written(
        processor, asked.question, len(asked.images) if asked.encoded is None else len(asked.encoded.tiles)
    )
    if asked.encoded is None:
        arguments = Inputs.of(processor, [prompt], [asked.images]).arguments(model, config)
    else:
        arguments = {
            **asked.encoded.inputs(processor, prompt),
            CACHE: TrimmedCache(model, config, pictures=asked.encoded),
        }
    length = arguments["input_ids"].shape[1]
    output = model.generate(
        **arguments,
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
        logits_processor=[OneByOne(settings, length)],
    )
    tokens = output[0, length:].tolist()
    for end in range(1, len(tokens) + 1):
        text = processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if any(stop in text for stop in settings.get("stop", ())):
            return tokens[:end]
    return tokens


def drawn_settings(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"max_new_tokens": draw.randint(1, 14)}
    if draw.random() < 0.6:
        found |= {"temperature": draw.choice([0.3, 0.8, 1.0, 1.7]), "seed": draw.randrange(2**32)}
        if draw.random() < 0.4:
            found["top_p"] = draw.choice([0.5, 0.9])
        if draw.random() < 0.4:
            found["top_k"] = draw.choice([1, 5, 20])
        if draw.random() < 0.3:
            found["min_p"] = draw.choice([0.02, 0.3])
    for name, values in (
        ("repetition_penalty", [0.8, 1.3]),
        ("presence_penalty", [-0.7, 1.1]),
        ("frequency_penalty", [-0.4, 0.9]),
    ):
        if draw.random() < 0.25:
            found[name] = draw.choice(values)
    if draw.random() < 0.3:
        found["stop"] = draw.sample(["red", "e ", "4", "bl", "un"], k=draw.randint(1, 2))
    return found


def drawn(small, draw: random.Random, config: TrimConfig, most_pictures: int = 3) -> Asked:
    """A question or a conversation, with no picture, some, or encoded ones."""
    count = draw.choice([number for number in (0, 1, 1, 2, 3) if number <= most_pictures])
    images = [draw.choice(PICTURES) for _ in range(count)]
    question: Any = draw.choice([draw.choice(EXAMPLES).question, "Read all digits.", "digit colour"])
    if draw.random() < 0.25:
        first = [{"type": "image"}] * len(images)
        question = [
            {"role": "user", "content": [*first, {"type": "text", "text": draw.choice(EXAMPLES).question}]},
            {"role": "assistant", "content": [{"type": "text", "text": draw.choice(EXAMPLES).answer}]},
            {"role": "user", "content": [{"type": "text", "text": "Read all digits."}]},
        ]
    encoded = None
    if images and draw.random() < 0.25:
        encoded = encode_pictures(*small, images, rule=draw.choice([None, KCenter(0.3)]))
    asked = Asked(question, images, drawn_settings(draw), encoded)
    asked.expected = alone(small, asked, config)
    return asked


def check(small, seed: int, number: int, running: int, config: TrimConfig, memory: int | None = None, on=None) -> int:
    """Ask from three threads at once, cancel some; how many were compared whole.

    Args:
        on: another model and processor that the engine has; the reference is `small` all the same.
    """
    draw = random.Random(seed)
    asked = [drawn(small, draw, config) for _ in range(number)]
    cancelled = {place for place in range(number) if draw.random() < 0.2}
    pauses = [draw.choice([0, 0, 0.01, 0.03]) for _ in asked]
    requests: dict[int, Any] = {}
    with Engine(*(on or small), config, max_running=running, memory=memory) as engine:

        def ask(first: int) -> None:
            for place in range(first, number, 3):
                requests[place] = asked[place].submit(engine)
                time.sleep(pauses[place])
                if place in cancelled:
                    requests[place].cancel()

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        texts = {place: "".join(request) for place, request in requests.items()}
        answers = {place: request.result(timeout=120) for place, request in requests.items()}
    compared = 0
    for place, answer in answers.items():
        expected, said = asked[place].expected, f"seed {seed}, request {place}: {asked[place].settings}"
        assert texts[place] == answer.text, said
        if answer.finish_reason == "cancelled":
            assert place in cancelled, said
            assert answer.tokens == expected[: len(answer.tokens)], said
        else:
            assert answer.tokens == expected, said
            compared += 1
        assert not any(stop in answer.text for stop in asked[place].settings.get("stop", ())), said
        assert (answer.kept > 0) is bool(asked[place].images) or answer.finish_reason == "cancelled", said
    assert len(answers) == number
    return compared


CONFIGS = [CONFIG, TrimConfig(top_k_ratio=1.0), TrimConfig(processors=[KCenter(0.3)]), TrimConfig(merge=False)]


@pytest.mark.parametrize(("seed", "running"), [(1, 16), (2, 3), (3, 1)])
def test_any_mix_of_requests_is_answered_as_alone(small, seed, running):
    assert check(small, seed, 16, running, CONFIGS[seed % len(CONFIGS)]) >= 8


def test_so_it_is_where_few_fit(small):
    with Engine(*small, CONFIG) as engine:
        most = engine.submit("digit colour", images=PICTURES[:3], max_new_tokens=40).needed
    assert check(small, 4, 12, 16, CONFIG, memory=2 * most) >= 6


@pytest.mark.slow
def test_a_thousand_requests(small):
    compared = sum(
        check(small, seed, 40, random.Random(seed).choice([1, 2, 5, 16, 32]), CONFIGS[seed % len(CONFIGS)])
        for seed in range(100, 130)
    )
    assert compared > 800


def failing_on(small, when, error):
    """A hook that fails the steps (one row of text each) whose last tokens fit."""

    def hook(_, args):
        if args[0].shape[1] == 1 and when(args[0][:, 0].tolist()):
            raise error

    return small[0].get_input_embeddings().register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [RuntimeError("not that token"), SystemExit(3)])
def test_a_step_that_fails_for_one_ends_nobody_else(small, error):
    draw = random.Random(9)
    asked = [drawn(small, draw, CONFIG, most_pictures=1) for _ in range(10)]
    for one in asked:
        one.settings.pop("stop", None)
        one.settings["max_new_tokens"] = 12
        one.expected = alone(small, one, CONFIG)
    inner = [one.expected[:-1] for one in asked]
    poison = min({token for own in inner for token in own}, key=lambda token: sum(token in own for own in inner))
    whose = [place for place, own in enumerate(inner) if poison in own]
    assert 0 < len(whose) < 4
    handle = failing_on(small, lambda tokens: poison in tokens, error)
    try:
        with Engine(*small, CONFIG) as engine:
            requests = [one.submit(engine) for one in asked]
            for place, request in enumerate(requests):
                if place in whose:
                    with pytest.raises(type(error)):
                        request.result(timeout=60)
                else:
                    assert request.result(timeout=60).tokens == asked[place].expected
            assert engine.healthy
            assert engine.stats()["failed"] == len(whose)
            assert engine.stats().get("read_again", 0) == 0
    finally:
        handle.remove()


def test_a_step_that_fails_only_together_goes_on_with_fewer(small):
    """Nobody's fault: no request ends with an error."""
    draw = random.Random(10)
    asked = [drawn(small, draw, CONFIG, most_pictures=1) for _ in range(8)]
    handle = failing_on(small, lambda tokens: len(tokens) > 3, RuntimeError("too many for this kernel"))
    try:
        with Engine(*small, CONFIG) as engine:
            answers = [request.result(timeout=60).tokens for request in [one.submit(engine) for one in asked]]
            assert engine.stats()["read_again"] > 0
    finally:
        handle.remove()
    assert answers == [one.expected for one in asked]


@pytest.mark.parametrize("where", ["read", "step"])
def test_a_text_that_nobody_seeded_goes_on_as_it_began_when_it_is_read_again(small, where):
    """What was sent before memory was full is the beginning of what comes after it."""
    full = iter([False, False, True, False, False, False, True])

    def hook(_, args):
        if args[0].shape[0] > 1 and (args[0].shape[1] > 1) is (where == "read") and next(full, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = small[0].get_input_embeddings().register_forward_pre_hook(hook)
    try:
        with Engine(*small, CONFIG) as engine:
            settings = {"temperature": 2.0, "max_new_tokens": 12}
            requests = [engine.submit("Read all digits.", images=[picture], **settings) for picture in PICTURES * 2]
            for request in requests:
                assert "".join(request) == request.result(timeout=60).text
            assert where == "read" or engine.stats()["read_again"] == 2
    finally:
        handle.remove()


def test_quantized_keys_and_values_join_and_leave(small):
    pytest.importorskip("bitsandbytes")
    draw = random.Random(11)
    config = TrimConfig(top_k_ratio=0.3, kv_quantization="int8")
    asked = [drawn(small, draw, config) for _ in range(12)]
    with Engine(*small, config, max_running=4) as engine:
        answers = [request.result(timeout=60).tokens for request in [one.submit(engine) for one in asked]]
    assert answers == [one.expected for one in asked]


def test_an_adapter_counts_as_it_is(small):
    """Switched off between two requests, it counts no more."""
    peft = pytest.importorskip("peft")
    from trim_plugin.integrations.peft import lora_config

    torch.manual_seed(0)
    adapted = peft.get_peft_model(load_small_model()[0], lora_config("text_attention", rank=4, init_lora_weights=False))
    own = adapted.eval(), small[1]
    draw = random.Random(12)
    asked = [drawn(own, draw, CONFIG) for _ in range(8)]
    base = [alone(small, one, CONFIG) for one in asked if one.encoded is None]
    with Engine(*own, CONFIG) as engine:
        answers = [request.result(timeout=60).tokens for request in [one.submit(engine) for one in asked]]
        with adapted.disable_adapter():
            without = [one.submit(engine) for one in asked if one.encoded is None]
            assert [request.result(timeout=60).tokens for request in without] == base
    assert answers == [one.expected for one in asked]
    assert base != [one.expected for one in asked if one.encoded is None]


def test_a_request_that_can_never_fit_is_refused_and_the_others_are_not(small):
    encoded = encode_pictures(*small, PICTURES[:3])
    with Engine(*small, CONFIG, memory=100_000) as engine:
        for about in ({"images": PICTURES[:3]}, {"pictures": encoded}):
            with pytest.raises(ValueError, match=r"may take .* bytes of keys and values, but the engine has 100000"):
                engine.submit("How many?", **about)
        assert engine.submit("How many?", max_new_tokens=2).result(timeout=60).tokens
