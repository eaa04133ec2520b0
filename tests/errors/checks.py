"""What the tests of errors share: an error that comes before any work, and one that comes in the prefill."""

from __future__ import annotations

import pytest

from trim_plugin import TrimmedCache

from ..random_models import Sample, generate, trimmed

SAMPLES = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4))]


def before_work(forwards, error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)
    assert forwards == [], "nothing ran"


def in_the_prefill(model, inputs, error, match, config):
    """The error comes from `generate`'s own cache, and from one given; the given one says so until it is reset."""
    with pytest.raises(error, match=match):
        trimmed(model, inputs, config)
    cache = TrimmedCache(model, config)
    with pytest.raises(error, match=match):
        generate(model, inputs, cache=cache)
    with pytest.raises(ValueError, match="left over from a forward that failed"):
        generate(model, inputs, cache=cache)
    return cache
