"""A choice does not depend on how precise the model's matrix products are, and comes out the same again."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trim_plugin import KCenter, TopKPerHead, TopPPerHead, VisualTokenProcessorList
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.precision import full_float32
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.select import Columns, select
from trim_plugin.selection.visibility import Visibility, pack

#: Operations that add float32 numbers up in any order on a GPU, or refuse to where the same result is asked for.
IN_ANY_ORDER = ("index_add", "scatter_add", "index_put", "put", "cumsum", "scatter_reduce", "bincount", "histc")


def precisions():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


class Watch(TorchDispatchMode):
    """Notes how precise every product of float32 matrices is, and which float operations add up in any order."""

    def __init__(self):
        super().__init__()
        self.products, self.unordered = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in ("bmm", "baddbmm", "mm", "addmm"):
            self.products.append(precisions())
        adds_up = args[-1] not in ("amax", "amin")  # the highest of some numbers is the same in any order
        if name.strip("_") in IN_ANY_ORDER and tensors[0].is_floating_point() and adds_up:
            self.unordered.append(name)
        return function(*args, **(kwargs or {}))


def one_choice(rule=None, dtype=torch.float32):
    """Scores, a choice, merging and the means of a sample with two visibility groups."""
    generator = torch.Generator().manual_seed(3)
    queries, keys, states = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 4, 6, 8), (2, 2, 80, 8), (2, 80, 300))
    )
    opened = torch.ones(2, 6, 2, dtype=torch.bool)
    opened[:, :3, 1] = False
    seen = Visibility(opened, torch.zeros(2, 6, dtype=torch.bool))
    index, ones = torch.arange(80).expand(2, -1), torch.ones(2, 80, dtype=torch.long)
    columns = Columns(index, ones.bool(), ones, seen.groups().gather(1, index // 40), ones.bool(), 0, 40)
    scores = visual_token_scores(queries, keys, seen, columns.tile_of, 0.3)
    rules = VisualTokenProcessorList([rule or TopKPerHead(0.1)])
    chosen = select(scores, keys, states, columns, 2, rules, merge=True)
    return scores, chosen.positions, chosen.merging.slots, chosen.merging.sizes, chosen.merging.mean(states)


RULES = [TopKPerHead(0.1), TopPPerHead(0.1), KCenter(0.1), KCenter(radius=0.9)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_that_choose_are_float32s_whatever_is_set_for_the_model(rule, setting):
    torch.set_float32_matmul_precision(setting)
    before = precisions()
    assert set(before) & {"tf32", "bf16"}
    with Watch() as watch:
        one_choice(rule)
    assert len(watch.products) >= 2
    assert set(watch.products) == {("ieee", "ieee")}
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == setting


def test_what_was_set_in_the_newer_words_comes_back():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with full_float32(torch.device("cpu")):
        assert precisions()[0] == "ieee"
    assert precisions()[0] == "tf32"


def test_the_last_thread_that_chooses_puts_the_setting_back():
    torch.set_float32_matmul_precision("high")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with full_float32(torch.device("cpu")):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with full_float32(torch.device("cpu")):
        thread.start()
        inside.wait()
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"


def test_an_error_puts_the_setting_back():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(KeyError), full_float32(torch.device("cpu")):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_same_result_is_asked_for_nothing_adds_up_in_any_order(rule, dtype):
    expected = one_choice(rule, dtype)
    torch.use_deterministic_algorithms(True)
    with Watch() as watch:
        again = one_choice(rule, dtype)
    assert watch.unordered == []
    for ours, theirs in zip(again, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_means_never_depend_on_an_order():
    """Without being asked, too: keys and states that are merged are the same again."""
    kept, zeros = torch.arange(50)[None] % 7 == 0, torch.zeros(1, 50).long()
    with Watch() as watch:
        merge_dropped(torch.randn(1, 50, 8), kept, zeros, zeros + 1, pack(kept)[0]).mean(torch.randn(1, 2, 50, 8))
    assert watch.unordered == []


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_float64_is_needed(rule):
    """Apple's GPUs have none."""

    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                assert not isinstance(one, torch.Tensor) or one.dtype != torch.float64, function
            return result

    with Doubles():
        one_choice(rule)
