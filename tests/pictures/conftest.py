"""One page of encoded pictures, which files are made of."""

from __future__ import annotations

import pytest

from trim_plugin import KCenter, encode_pictures
from trim_plugin.embedded import examples, load_small_model


@pytest.fixture(scope="module")
def small():
    return load_small_model()


@pytest.fixture(scope="module")
def page(small):
    return encode_pictures(*small, [examples()[4].picture], rule=KCenter(0.25))
