"""An engine on a model that is split over two devices counts on each what its layers keep there."""

from __future__ import annotations

import collections
import time

import pytest
import torch

from trim_plugin import Engine, TrimmedCache, prefill
from trim_plugin.embedded import ask, examples, load_small_model
from trim_plugin.engine.memory import OF_FREE_MEMORY, Room, Taken, parts_of
from trim_plugin.forward.hooks import find_text_model

from .emulation import Emulation
from .ways import emulated_place, on_devices

MUCH = 2**30
PICTURE = examples()[0].picture


@pytest.fixture
def free(monkeypatch):
    """Bytes that each device has free, to be set."""
    free = {0: MUCH, 1: MUCH}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[torch.device(device).index], MUCH))
    return free


@pytest.fixture
def split():
    """The small model on two devices, with one of its cross-attention layers at least on each."""
    model, processor = load_small_model()
    crossing = find_text_model(model).config.cross_attention_layers
    with Emulation():
        yield on_devices(model, 2, crossing[-1]), processor


def held(cache):
    """Bytes of keys and values by the device that they are on, self-attention's and cross-attention's."""
    found = collections.Counter()
    for number, layer in enumerate(cache.layers):
        crossing = number not in cache.self_layers
        tensors = [one for store in layer.stores for one in store.tensors] if crossing else [layer.keys, layer.values]
        for one in tensors:
            found[str(one.device), crossing] += one.nbytes
    return found


def test_what_torch_keeps_of_earlier_work_is_free(split, free, monkeypatch):
    before = [part.memory for part in parts_of(split[0])]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * MUCH)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * MUCH)
    assert [part.memory for part in parts_of(split[0])] == pytest.approx([3 * own for own in before])


def test_what_a_room_expects_on_a_device_is_what_a_cache_holds_there(split, free):
    model, processor = split
    cache = TrimmedCache(model, {"top_k_ratio": 1.0})
    inputs = {name: tensor.to("cuda:0") for name, tensor in ask(processor).items()}
    prefill(model, cache, **inputs)
    room, there = Room(model, cache.config, None), held(cache)
    taken = Taken(room.text_bytes(inputs["input_ids"].shape[1]), room.kept_bytes(int(cache.report().kept_tokens[0])))
    assert len(room.parts) == 2
    for part in room.parts:
        place = str(part.device)
        assert part.bytes_of(taken) == there[place, False] + there[place, True] > 0
        assert part.memory == int(OF_FREE_MEMORY * MUCH)
    assert sum(part.bytes_of(taken) for part in room.parts) == taken.total


def test_each_device_has_its_own_layers_of_the_random_model(free):
    """Of six layers, the first three on one device; 1 and 3 are cross-attention layers."""
    with Emulation():
        model = emulated_place(2, "sdpa").model
        crossing = find_text_model(model).config.cross_attention_layers
        first, second = parts_of(model)
    layers = find_text_model(model).config.num_hidden_layers
    assert (str(first.device), str(second.device)) == ("cuda:0", "cuda:1")
    assert first.visual == sum(number < 3 for number in crossing) / len(crossing)
    assert first.text == sum(number < 3 for number in range(layers) if number not in crossing) / (
        layers - len(crossing)
    )
    assert first.text + second.text == first.visual + second.visual == 1.0


def test_a_model_with_removed_layers_is_counted_by_the_layers_that_it_has(free):
    """Layers 1 and 3, of which each device has one, cross pictures; what is left of self-attention is on the second device."""
    with Emulation():
        model = emulated_place(2, "sdpa").model
        text_model = find_text_model(model)
        layers = text_model.layers
        text_model.layers = torch.nn.ModuleList([layers[number] for number in (1, 3, 4)])
        shares = {str(part.device): (part.text, part.visual) for part in parts_of(model)}
        text_model.layers = layers
    assert shares == {"cuda:0": (0.0, 0.5), "cuda:1": (1.0, 0.5)}


@pytest.mark.parametrize("tight", [0, 1])
def test_a_request_that_one_device_has_no_room_for_is_refused(split, free, tight):
    """The other one has plenty."""
    free[tight] = 20_000
    refused = pytest.raises(ValueError, match=rf"on cuda:{tight}, but the engine has 14000 there\. Ask for fewer")
    with Engine(*split, {"top_k_ratio": 1.0}) as engine, refused:
        engine.submit("Read all digits.", images=[PICTURE], max_new_tokens=5)


def test_requests_wait_for_the_device_that_is_full(split, free):
    """There is room for one request on the second device and for many on the first: they are answered one after the other."""
    config, settings = {"top_k_ratio": 0.3}, {"images": [PICTURE], "max_new_tokens": 5}

    def answered(requests):
        with Engine(*split, config) as engine:
            asked, most = [engine.submit("Read all digits.", **settings) for _ in range(requests)], 0
            while not all(request.done for request in asked):
                most = max(most, engine.stats()["running"])
                time.sleep(0.001)
        return [request.result().tokens for request in asked], asked[0].takes, most

    expected, takes, most = answered(3)
    assert most > 1
    free[1] = int(1.5 * parts_of(split[0])[1].bytes_of(takes) / OF_FREE_MEMORY)
    found, _, most = answered(3)
    assert found == expected
    assert most == 1
