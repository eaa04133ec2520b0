"""The rows of docs/errors.md about training."""

from __future__ import annotations

import pytest

from trim_plugin.integrations.peft import lora_config, prepare_qlora
from trim_plugin.integrations.training import AnswerCollator

from .checks import before_work

pytestmark = pytest.mark.usefixtures("generates_as_before")


def test_qlora_on_a_model_not_quantized(model, forwards):
    config = lora_config("text_linear")
    before_work(forwards, ValueError, "this MllamaForC.* is not quantized", prepare_qlora, model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "Example 1 has no 'answer'.*remove_unused_columns=False"),
        ({"answer": None, "question": None}, "Example 1 has no 'answer', 'question'"),
        ({"pictures": []}, "Example 1 has no picture"),
        ({"answer": " "}, "Example 1 has an empty answer"),
    ],
)
def test_example_without_answer(change, message):
    good = {"pictures": ["a picture"], "question": "What?", "answer": "This."}
    bad = {key: value for key, value in (good | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        AnswerCollator(processor=None)([good, bad])
    with pytest.raises(ValueError, match="no examples"):
        AnswerCollator(processor=None)([])
