"""When encoded pictures are equal."""

from __future__ import annotations

import torch

from trim_plugin.pictures import stored

EQUAL = ("states", "index", "sizes", "mark")


def assert_equal(one, other):
    for name in EQUAL:
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in (*stored.NUMBERS, "tower_share"):
        assert getattr(one, name) == getattr(other, name)
