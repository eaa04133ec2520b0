"""Host reads and copies against stock's: none over budget, the page shows what is measured, and one too many is found."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from packaging.version import Version

from trim_plugin.compat import slices_mask_rows
from trim_plugin.selection import k_center, scoring

from ..random_models import Sample
from . import budgets
from .emulation import Emulation

#: Whose numbers the page shows: stock's own differ between releases.
SHOWN_FOR = "5.24"
#: On two devices what is read on both, made there once, could be read twice.
ON_BOTH = ("two samples", "beams in 4 micro-batches", "second turn, a picture")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(name, devices):
    case = budgets.CASES[name]
    if case.needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    if case.assisted and not slices_mask_rows():
        pytest.skip("this transformers cannot do it with pictures")
    if case.stock and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("stock's static cache has no room for pictures in this transformers")
    assert budgets.measured_on(name, devices).problems == []


@pytest.mark.parametrize("name", budgets.CASES)
def test_reads_and_copies_are_within_the_budget(name):
    check(name, 1)


@pytest.mark.parametrize("name", ON_BOTH)
def test_two_devices_have_the_same_budget(name):
    check(name, 2)


def test_groups_that_are_chosen_from_in_several_blocks_ask_no_more_often(monkeypatch):
    """Ten pages' groups are a block on a GPU; here each is one."""
    monkeypatch.setattr(k_center, "COVER_BYTES", 1)
    case = budgets.Case([Sample((1, (2,), 3))] * 6, {"prefill_pictures": 6}, image_size=144)
    monkeypatch.setitem(budgets.CASES, "blocks", case)
    check("blocks", 1)
    assert budgets.measured_on("blocks", 1).ours.k_center == k_center.ASKS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in budgets.CASES if name not in ON_BOTH])
def test_two_devices_have_it_in_every_case(name):
    check(name, 2)


@pytest.mark.skipif(not transformers.__version__.startswith(SHOWN_FOR), reason=f"the page is for {SHOWN_FOR}")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_page_shows_what_is_measured():
    """`python -m tests.accelerator.budgets` brings it up to date."""
    assert budgets.shown() == budgets.table()


def test_a_read_and_a_copy_for_every_sample_are_found(monkeypatch):
    """What a budget is for: something that is right, and waits for the device as often as there are samples."""
    right = scoring.visual_token_scores

    def scores(queries, keys, *others):
        for sample in range(len(keys)):
            bool(keys[sample].isfinite().all())
            torch.tensor([sample], device=keys.device)
        return right(queries, keys, *others)

    monkeypatch.setattr("trim_plugin.forward.turn.visual_token_scores", scores)
    with Emulation() as device:
        place = budgets.emulated_place(1, "sdpa")
        reads, copies = budgets.measured("the paper's rule", place, device).problems
    assert "9 more reads than stock, 8 are allowed" in reads
    assert "12 more copies than stock, 4 are allowed" in copies
    assert "test_budgets" not in copies  # lines are told of the package and of transformers
