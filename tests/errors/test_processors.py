"""The rows of docs/errors.md about processors."""

from __future__ import annotations

import pytest
import torch

from trim_plugin import TopKPerHead, TrimmedCache

from ..random_models import generate, trimmed
from .checks import in_the_prefill

pytestmark = pytest.mark.usefixtures("generates_as_before")


@pytest.mark.parametrize("wrong", [lambda s, v: s[..., :-1], lambda s, v: s[0], lambda s, v: s.amax(dim=1)])
def test_processor_shape(model, inputs, wrong):
    in_the_prefill(model, inputs, ValueError, "returned scores of shape .* instead of", {"processors": [wrong]})


@pytest.mark.parametrize("wrong", [lambda s, v: None, lambda s, v: s.tolist()])
def test_processor_type(model, inputs, wrong):
    in_the_prefill(model, inputs, TypeError, "instead of a tensor", {"processors": [wrong]})


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_processor_mask(model, inputs, dtype):
    def best_half(scores, visible):
        return (scores > 0.01).to(dtype)

    match = rf"best_half returned {dtype} instead of float scores. " + (
        r"It looks like a mask.* scores.masked_fill\(~mask, float\('-inf'\)\)"
        if dtype == torch.bool
        else "Return the scores"
    )
    in_the_prefill(model, inputs, TypeError, match, {"processors": [best_half]})


def test_processors_without_a_repr_are_named_by_their_class(model, inputs):
    class Forgetful:
        def __call__(self, scores, visible):
            return self.result(scores)

    wrong = Forgetful()
    for result, match in (
        (lambda scores: None, "processor Forgetful returned NoneType"),
        (lambda scores: scores > 0, "processor Forgetful returned torch.bool"),
        (
            lambda scores: torch.full_like(scores, -torch.inf),
            "processors TopKPerHead\\(0.5\\), Forgetful removed every",
        ),
    ):
        wrong.result = result
        with pytest.raises((TypeError, ValueError), match=match):
            trimmed(model, inputs, {"processors": [TopKPerHead(0.5), wrong]})
    with pytest.raises(ValueError, match="got the single Forgetful"):
        TrimmedCache(model, {"processors": wrong})


def test_processor_nan(model, inputs):
    wrong = [lambda s, v: s * float("nan")]
    cache = in_the_prefill(model, inputs, ValueError, "returned NaN", {"processors": wrong})
    cache.reset()
    with pytest.raises(ValueError, match="returned NaN"):
        generate(model, inputs, cache=cache)


def test_processor_empties_a_group(model, inputs):
    match = "removed every visual token of visibility group 0 in sample 0"
    in_the_prefill(model, inputs, ValueError, match, {"processors": [lambda s, v: torch.full_like(s, -torch.inf)]})
