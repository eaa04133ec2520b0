"""Every way of generating, on the emulated accelerator: the CPU's tokens, and what is kept; and a mistake with devices fails."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from trim_plugin.cache import kept
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.kept import KeptTokens
from trim_plugin.cache.layers import CrossAttentionLayer
from trim_plugin.compat import slices_mask_rows
from trim_plugin.forward import turn
from trim_plugin.selection import visibility

from .emulation import Emulation
from .ways import ATTENTIONS, NEEDS_BITSANDBYTES, WAYS, WRITES, cpu_place, emulated_place

EVERY = [(way, devices, attention) for way in WAYS for devices in (1, 2) for attention in ATTENTIONS]
#: Every way on one device and on two, and all three attention functions in turn.
COVERING = {
    (way, devices, ATTENTIONS[(number + devices) % len(ATTENTIONS)])
    for number, way in enumerate(WAYS)
    for devices in (1, 2)
}


@functools.lru_cache(maxsize=16)
def place(devices, attention):
    """Made once: a way leaves a model as it was."""
    return emulated_place(devices, attention) if devices else cpu_place(attention)


def run(way, where, folder):
    if way in NEEDS_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    if way in ("assisted", "prompt lookup") and not slices_mask_rows():
        pytest.skip("this transformers cannot do it with pictures")
    torch.manual_seed(0)
    return WAYS[way](where, **({"folder": folder} if way in WRITES else {}))


def check(way, devices, attention, folder):
    expected = run(way, place(0, attention), folder / "cpu")
    with Emulation() as device:
        found = run(way, place(devices, attention), folder / "device")
    assert found == expected
    assert device.launches.total() > 0
    assert (device.crossings.total() > 0) is (devices == 2)


@pytest.fixture
def folder(tmp_path):
    for name in ("cpu", "device"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(("way", "devices", "attention"), sorted(COVERING))
def test_a_way_gives_the_tokens_of_the_cpu(way, devices, attention, folder):
    check(way, devices, attention, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "devices", "attention"), [one for one in EVERY if one not in COVERING])
def test_every_way_with_every_attention(way, devices, attention, folder):
    check(way, devices, attention, folder)


def a_mask_on_the_cpu(monkeypatch):
    """The mask of what survived the first layer is left on the host."""
    right = turn.take_columns
    monkeypatch.setattr(turn, "take_columns", lambda *args: right(*args).cpu())


def decoding_masks_on_the_first_device(monkeypatch):
    """What a decoding step reads with is left where it was made, not where the layer's keys are."""
    right = CrossAttentionLayer.settle

    def settle(self, kept, picked):
        right(self, kept, picked)
        self.masks = [own.mask for own in kept.classes]

    monkeypatch.setattr(CrossAttentionLayer, "settle", settle)


def samples_chosen_on_the_first_device(monkeypatch):
    """Who stays in a batch is an index on the first device, for layers of all devices: a mistake that this emulation found."""

    def batch_select_indices(self, indices):
        for index in self.self_layers:
            self.layers[index].batch_select_indices(indices.to("cuda:0"))
        self._follow(indices.tolist())

    monkeypatch.setattr(HeldCache, "batch_select_indices", batch_select_indices)


def an_index_without_device(monkeypatch):
    """Numbers that follow from what is kept are made where tensors are made by default, not on the record's device."""

    def there(self, device):
        return torch.tensor([list(self.order)] * 3)

    monkeypatch.setattr(KeptTokens, "_numbers_on", there)


def positions_made_on_the_host(monkeypatch):
    """Which of the columns survive is counted on the host and not brought to the device."""
    right = visibility.pack

    def pack(chosen, longest=None):
        return tuple(one.cpu() for one in right(chosen, longest))

    monkeypatch.setattr(kept, "pack", pack)


@pytest.mark.parametrize(
    ("mistake", "way", "devices", "message"),
    [
        (a_mask_on_the_cpu, "dropped", 1, "at least two devices, cpu and cuda:0"),
        (decoding_masks_on_the_first_device, "default", 2, "at least two devices, cuda:0 and cuda:1"),
        (an_index_without_device, "beams, several returned", 1, r"same device as the indexed tensor \(cpu\)"),
        (positions_made_on_the_host, "dropped", 1, "cpu and cuda:0|index is on cpu"),
        (samples_chosen_on_the_first_device, "by hand", 2, "indices are on cuda:0, the indexed tensor on cuda:1"),
    ],
)
def test_a_planted_mistake_is_found(monkeypatch, folder, mistake, way, devices, message):
    """None of them shows on a CPU."""
    expected = run(way, place(0, "sdpa"), folder / "cpu")
    with Emulation():
        where = place(devices, "sdpa")
    mistake(monkeypatch)
    assert run(way, cpu_place("sdpa"), folder / "cpu") == expected if "cuda:1" not in message else True
    with Emulation(), pytest.raises(RuntimeError, match=message):
        run(way, where, folder / "device")
