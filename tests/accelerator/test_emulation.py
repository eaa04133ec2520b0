"""The emulated accelerator itself: the CPU's numbers, the rules of devices, and what it counts."""

from __future__ import annotations

import threading

import pytest
import torch

from .emulation import Emulation, to_devices


@pytest.fixture
def device():
    with Emulation() as running:
        yield running


def test_it_computes_what_the_cpu_does(device):
    here = torch.randn(3, 4)
    there = here.to("cuda")
    assert (there.device, there.is_cuda, there.shape) == (torch.device("cuda", 0), True, (3, 4))
    product = (there @ there.T).softmax(dim=-1)[1:, [0, 2]]
    assert product.device.type == "cuda"
    assert torch.equal(product.cpu(), (here @ here.T).softmax(dim=-1)[1:, [0, 2]])
    model = to_devices(torch.nn.Linear(4, 2), 1)
    assert torch.equal(model(here.to(1)).cpu(), to_devices(model, 0)(there).cpu())


@pytest.mark.parametrize(
    "mixes",
    [
        lambda one, other: one + other,
        lambda one, other: torch.cat([one, other]),
        lambda one, other: one @ other,
        lambda one, other: torch.where(one > 0, one, other),
        lambda one, other: one.masked_fill(other > 0, 0.0),
        lambda one, other: one.index_select(0, other[0].long()),
        lambda one, other: one.__setitem__((one[0] > 0).nonzero()[:, 0], other),
        lambda one, other: torch.nn.functional.scaled_dot_product_attention(one[None], one[None], other[None]),
    ],
)
@pytest.mark.parametrize("places", [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
def test_tensors_of_two_devices_are_not_mixed(device, mixes, places):
    one, other = torch.ones(2, 2).to(places[0]), torch.ones(2, 2).to(places[1])
    assert mixes(one, one.clone()) is not NotImplemented
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixes(one, other)


def test_indices_are_where_the_tensor_is_or_on_the_cpu(device):
    tensor = torch.arange(4).to("cuda:0")
    assert tensor[torch.tensor([1, 2])].tolist() == tensor[torch.tensor([1, 2]).to("cuda:0")].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="indices are on cuda:1"):
        tensor[torch.tensor([1]).to("cuda:1")]
    with pytest.raises(RuntimeError, match="on the same device as the indexed tensor"):
        torch.arange(4)[tensor]


@pytest.mark.parametrize(
    ("reads", "does"),
    [
        (1, lambda tensor: tensor.sum().item()),
        (1, lambda tensor: bool((tensor > 0).all())),
        (1, lambda tensor: int(tensor[0, 0])),
        (1, lambda tensor: tensor.tolist()),
        (1, lambda tensor: tensor.cpu()),
        (1, lambda tensor: tensor.to("cpu", torch.float64)),
        (1, lambda tensor: tensor.nonzero()),
        (1, lambda tensor: tensor[tensor > 0]),
        (1, lambda tensor: torch.equal(tensor, tensor)),
        (1, lambda tensor: tensor.unique()),
        (1, lambda tensor: torch.zeros(2, 2).copy_(tensor)),
        (0, lambda tensor: tensor.masked_fill(tensor > 0, 1.0)),
        (0, lambda tensor: tensor.__setitem__(tensor > 0, 1.0)),
        (0, lambda tensor: torch.where(tensor > 0, tensor, 0.0)),
        (0, lambda tensor: tensor.sort(dim=-1).values.cumsum(dim=-1)),
        (0, lambda tensor: tensor.to(torch.float64)[:, 1:]),
    ],
)
def test_host_reads_are_counted(device, reads, does):
    tensor = torch.ones(2, 2).to("cuda")
    device.clear()
    does(tensor)
    assert device.reads.total() == reads


@pytest.mark.parametrize(
    ("copies", "does"),
    [
        (1, lambda tensor: torch.ones(2).to("cuda")),
        (1, lambda tensor: torch.tensor([1, 2], device="cuda")),
        (1, lambda tensor: torch.as_tensor([1, 2], device="cuda:1")),
        (1, lambda tensor: tensor.new_tensor([1, 2])),
        (1, lambda tensor: tensor[[0, 1]]),
        (1, lambda tensor: tensor[torch.tensor([0, 1])]),
        (1, lambda tensor: tensor.copy_(torch.zeros(2, 2))),
        (1, lambda tensor: tensor.__setitem__(slice(1), torch.zeros(2))),
        (0, lambda tensor: torch.tensor([], device="cuda")),
        (0, lambda tensor: torch.zeros(2, device="cuda") + tensor.new_ones(2)),
        (0, lambda tensor: torch.arange(3, device="cuda")),
        (0, lambda tensor: tensor.to("cuda:0")),
        (0, lambda tensor: tensor.to("cuda:1")),
    ],
)
def test_copies_to_a_device_are_counted(device, copies, does):
    tensor = torch.ones(2, 2).to("cuda")
    device.clear()
    does(tensor)
    assert device.copies.total() == copies


def test_what_goes_from_device_to_device_is_counted_apart(device):
    tensor = torch.ones(2, 2).to("cuda")
    device.clear()
    assert tensor.to("cuda:1").device.index == 1
    assert (device.reads.total(), device.copies.total(), device.crossings.total()) == (0, 0, 1)


def test_views_launch_nothing(device):
    tensor = torch.ones(2, 2).to("cuda")
    device.clear()
    tensor[None, :1].transpose(0, 1).reshape(-1)
    assert device.launches.total() == 0
    tensor.add_(1)
    assert device.launches.total() == 1


def test_lines_are_told(device):
    from trim_plugin.selection.visibility import pack

    chosen = torch.tensor([[True, False]]).to("cuda")
    device.clear()
    pack(chosen)
    (line,) = device.reads
    assert line.startswith("_local_scalar_dense at trim_plugin/selection/visibility.py:")


def test_threads_that_start_within_are_emulated(device):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda")))
    thread.start()
    thread.join()
    assert found[0].is_cuda
