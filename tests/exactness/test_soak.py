"""A thousand generations of mixed kinds on one model: memory does not grow. Run by `pytest -m slow`."""

from __future__ import annotations

import copy
import gc

import psutil
import pytest
import torch

from trim_plugin import TrimmedCache
from trim_plugin.compat import slices_mask_rows

from ..random_models import Sample, generate, random_inputs, random_model, trimmed
from .conversations import Conversation

WARM_UP, GENERATIONS = 200, 1000
TRIM, EXACT = {"top_k_ratio": 0.25}, {"top_k_ratio": 1.0}


def follow_ups(model, _inputs):
    cache = TrimmedCache(model, TRIM)
    conversation = Conversation(model)
    for turn in (Sample(((6,), 3)), Sample((2,)), Sample((1, (2,), 3))):
        earlier = conversation.pixels.shape[1]
        inputs = conversation.say(turn).inputs(earlier)
        generate(model, inputs, 3, cache=copy.deepcopy(cache))
        conversation.hear(generate(model, inputs, 3, cache=cache).sequences)
    return 6


def failing(model, inputs):
    cache = TrimmedCache(model, {"processors": [lambda scores, visible: None]})
    with pytest.raises(TypeError):
        generate(model, inputs, 3, cache=cache)
    with pytest.raises(ValueError, match="Unknown field"):
        trimmed(model, inputs, {"ratio": 1})
    return 2


def once(**settings):
    def kind(model, inputs):
        trimmed(model, inputs, **{"config": TRIM, "new": 6, **settings})
        return 1

    return kind


KINDS = [
    once(),
    once(config=EXACT),
    once(config=None, num_beams=3),
    once(do_sample=True, num_return_sequences=2),
    once(output_hidden_states=True),
    lambda model, inputs: len([generate(model, inputs, 6)]),
    lambda model, inputs: len([generate(model, {"input_ids": inputs["input_ids"].clamp(max=31)}, 6)]),
    follow_ups,
    failing,
]


def assisted(model, inputs):
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    trimmed(model, alone, TRIM, 6, prompt_lookup_num_tokens=3)
    trimmed(model, alone, TRIM, 6, assistant_model=model)
    return 2


@pytest.mark.slow
def test_memory_does_not_grow(capsys):
    model = random_model()
    batches = [
        [Sample((2, (6,), 5))],
        [Sample(((2,), 4)), Sample((1, (1, 3), 6))],
        [Sample((3, (6,), 2, (5,), 9)), Sample((5,)), Sample(((4, 4), 3))],
    ]
    prompts = [random_inputs(model, samples) for samples in batches]
    kinds = [*KINDS, *([assisted] if slices_mask_rows() else [])]
    process = psutil.Process()
    done, step, resident = 0, 0, []
    while done < WARM_UP + GENERATIONS:
        torch.manual_seed(step)
        done += kinds[step % len(kinds)](model, prompts[step // len(kinds) % len(prompts)])
        step += 1
        if (not resident and done >= WARM_UP) or done >= WARM_UP + GENERATIONS:
            gc.collect()
            resident.append(process.memory_info().rss)
    growth = resident[1] / resident[0] - 1
    with capsys.disabled():
        print(
            f"\n{done - WARM_UP} generations after {WARM_UP} to warm up: resident memory {resident[0] / 2**20:.1f} MiB -> "
            f"{resident[1] / 2**20:.1f} MiB ({growth:+.2%})"
        )
    assert growth < 0.01
