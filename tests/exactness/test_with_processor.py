"""The whole way from a chat to an answer: processor, chat template, `pipeline`, streamers, on the small trained model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, TextStreamer, pipeline

from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE
from trim_plugin.embedded import ask, examples

SETTINGS = {"max_new_tokens": 8, "do_sample": False}
TRIMMED = {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 0.25}}
EXACT = {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 1.0}}


@pytest.fixture(scope="module")
def chat():
    example = examples()[0]
    with Image.open(example.picture) as picture:
        content = [{"type": "image", "image": picture.convert("RGB")}, {"type": "text", "text": example.question}]
    return [{"role": "user", "content": content}]


def test_chat_template_makes_the_inputs(small, chat):
    model, processor = small
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**ask(processor), **SETTINGS)
    assert torch.equal(expected, model.generate(**inputs, **SETTINGS, **EXACT))


def test_pipeline(small, chat):
    model, processor = small
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answers = []
    for cache in ({}, EXACT, TRIMMED):
        output = pipe(text=chat, return_full_text=False, generate_kwargs={**SETTINGS, **cache})
        answers.append(output[0]["generated_text"])
    assert answers[0] == answers[1]
    assert isinstance(answers[2], str)


def test_text_streamer_prints_the_answer(small, capsys):
    model, processor = small
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = ask(processor)
    output = model.generate(**inputs, **SETTINGS, **TRIMMED, streamer=streamer)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == answer.strip()


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_two_turns_by_the_processor(small, ratio):
    """A text-only question and one about another picture, with inputs that the processor makes of the whole chat."""
    model, processor = small
    first, *others = examples()
    second = next(other for other in others if other.picture != first.picture)

    def chat_inputs(turns):
        chat, pictures = [], []
        for question, picture, answer in turns:
            content = [{"type": "text", "text": question}]
            if picture is not None:
                with Image.open(picture) as opened:
                    pictures.append(opened.convert("RGB"))
                content.insert(0, {"type": "image"})
            chat.append({"role": "user", "content": content})
            if answer is not None:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        return dict(processor(images=pictures, text=text, add_special_tokens=False, return_tensors="pt"))

    cache = TrimmedCache(model, {"top_k_ratio": ratio})
    stock = DynamicCache(config=model.config.text_config)
    turns = [(first.question, first.picture, None)]
    whole = chat_inputs(turns)
    ours = model.generate(**whole, **SETTINGS, **{CACHE: cache})
    model.generate(**whole, **SETTINGS, **{CACHE: stock})
    answer = processor.decode(ours[0, whole["input_ids"].shape[1] :], skip_special_tokens=True)
    seen = 1
    for question, picture in ((first.question, None), (second.question, second.picture)):
        turns[-1] = (*turns[-1][:2], answer.strip())
        turns.append((question, picture, None))
        whole = chat_inputs(turns)
        # The conversation's text must go on where the cache ends; what the model said is not tokenised anew.
        past = cache.get_seq_length()
        if not torch.equal(whole["input_ids"][:, :past], ours[:, :past]):
            pytest.skip("this chat template does not repeat the answer's tokens")
        follow_up = dict(whole)
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            new = follow_up.pop(name)[:, seen:]
            if new.shape[1]:
                follow_up[name] = new
        ours = model.generate(**follow_up, **SETTINGS, **{CACHE: cache})
        if ratio == 1.0:
            assert torch.equal(model.generate(**whole, **SETTINGS), ours)
        seen += picture is not None
        answer = processor.decode(ours[0, whole["input_ids"].shape[1] :], skip_special_tokens=True)
