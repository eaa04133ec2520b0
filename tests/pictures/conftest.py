"""One page of encoded pictures, which files are made of, and when two are equal."""

from __future__ import annotations

import pytest
import torch

from trim_plugin import KCenter, encode_pictures
from trim_plugin.embedded import examples
from trim_plugin.pictures import stored


@pytest.fixture(scope="module")
def page(small):
    return encode_pictures(*small, [examples()[4].picture], rule=KCenter(0.25))


def assert_equal(one, other):
    for name in ("states", "index", "sizes", "mark"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in (*stored.NUMBERS, "tower_share"):
        assert getattr(one, name) == getattr(other, name)
