"""The engine on emulated devices: any mix of requests is answered as each is alone on the CPU."""

from __future__ import annotations

import pytest

from ..engine.test_company import CONFIGS, check
from .emulation import Emulation
from .ways import cpu_place, emulated_place


def compared(devices, attention, seed, number, memory=2**30):
    """Arrivals, lengths, pictures, settings and cancellations drawn by the seed; how many ended by themselves."""
    small = cpu_place(attention).small()
    with Emulation() as device:
        on = emulated_place(devices, attention).small()
        found = check(small, seed, number, 1 + seed % 7, CONFIGS[seed % len(CONFIGS)], memory, on)
    assert device.launches.total() > 0
    assert (device.crossings.total() > 0) is (devices == 2)
    return found


@pytest.mark.parametrize(("devices", "seed"), [(1, 20), (1, 21), (2, 22), (2, 23)])
def test_any_mix_of_requests_is_answered_as_alone_on_the_cpu(devices, seed):
    assert compared(devices, "sdpa", seed, 8) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_many_mixes(devices, attention):
    found = sum(compared(devices, attention, seed, 16, memory=3 * 10**6) for seed in range(200, 206))
    assert found > 60
