"""A random model that gives the same answers before and after a test, whatever goes wrong in it."""

from __future__ import annotations

import pytest
import torch

from trim_plugin.compat import cache_of

from ..random_models import generate, random_inputs, random_model, trimmed
from .checks import SAMPLES


@pytest.fixture(scope="package")
def model():
    return random_model()


@pytest.fixture
def inputs(model):
    return random_inputs(model, SAMPLES)


@pytest.fixture
def generates_as_before(model):
    """Whatever a test does wrong, model and inputs give the same answers before and after."""
    given = random_inputs(model, SAMPLES, seed=9)
    stock, ours = generate(model, given), trimmed(model, given, {"top_k_ratio": 0.2})
    yield
    assert torch.equal(stock.sequences, generate(model, given).sequences)
    again = trimmed(model, given, {"top_k_ratio": 0.2})
    assert torch.equal(ours.sequences, again.sequences)
    pairs = zip(cache_of(ours).kept_indices, cache_of(again).kept_indices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def forwards(model):
    """Counts how often the vision tower or the text model ran."""
    ran = []
    towers = (model.model.vision_model, model.model.language_model)
    handles = [tower.register_forward_pre_hook(lambda *_: ran.append(1)) for tower in towers]
    yield ran
    for handle in handles:
        handle.remove()
