"""Pictures that are remembered: what is asked for again is not encoded again, and no more is held than was allowed."""

from __future__ import annotations

import copy
import errno
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from trim_plugin import encode_pictures, open_picture
from trim_plugin.embedded import examples
from trim_plugin.pictures.recent import RecentPictures


@pytest.fixture(scope="module")
def pages():
    return [open_picture(example.picture) for example in examples()[:4]]


@pytest.fixture
def calls(small):
    """The number of pictures in every call of the vision tower."""
    seen: list[int] = []
    handle = small[0].model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    yield seen
    handle.remove()


def test_a_picture_goes_through_the_tower_once(small, pages, calls):
    recent = RecentPictures(*small)
    first, again, both = recent(pages[:1]), recent([pages[0].copy()]), recent(pages[:2])
    assert len(calls) == recent.encoded == 2
    assert again is first
    expected = encode_pictures(*small, pages[:2])
    torch.testing.assert_close(both.states, expected.states, rtol=0, atol=0)
    assert both.index.equal(expected.index)
    assert both.tiles == expected.tiles


def test_the_same_numbers_in_another_shape_are_another_picture(small):
    recent = RecentPictures(*small)
    wide, high = recent([Image.new("RGB", (64, 32), "red")]), recent([Image.new("RGB", (32, 64), "red")])
    assert recent.encoded == 2
    assert wide.tiles != high.tiles or not wide.states.equal(high.states)


def test_the_least_recently_asked_for_go_first(small, pages, calls):
    one = encode_pictures(*small, pages[:1]).nbytes
    calls.clear()
    recent = RecentPictures(*small, most_bytes=2 * one)
    for page in (pages[0], pages[1], pages[0], pages[2]):  # the third goes in place of the second
        recent([page])
    assert len(calls) == 3
    recent([pages[0]])
    assert len(calls) == 3
    recent([pages[1]])
    assert len(calls) == 4
    assert recent.nbytes == 2 * one


@pytest.mark.parametrize("room", [0.0, 0.5, 1.0, 2.5])
def test_never_more_than_was_allowed(small, pages, room):
    one = encode_pictures(*small, pages[:1]).nbytes
    recent = RecentPictures(*small, most_bytes=int(room * one))
    drawn = random.Random(0)
    for _ in range(12):
        asked = drawn.sample(pages, k=drawn.randint(1, 3))
        assert len(recent(asked).tiles) == len(asked)
        assert recent.nbytes <= room * one


def test_a_folder_is_of_use_to_later_runs(small, pages, calls, tmp_path):
    folder = tmp_path / "encoded" / "pages"
    first = RecentPictures(*small, folder=folder)(pages[:2])
    assert len(list(folder.iterdir())) == len(calls) == 2
    later = RecentPictures(*small, folder=folder)
    again = later(pages[:2])
    assert torch.equal(again.states, first.states)
    assert (len(calls), later.encoded, later.reused) == (2, 0, 2)
    list(map(Path.unlink, folder.iterdir()))
    assert later(pages[:1]).tiles == first.tiles[:1], "what is held needs no file"
    assert len(calls) == 2


def test_files_that_are_cut_off_or_of_another_model_are_written_anew(small, pages, tmp_path):
    first = RecentPictures(*small, folder=tmp_path)(pages[:1])
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    recent = RecentPictures(*small, folder=tmp_path)
    assert torch.equal(recent(pages[:1]).states, first.states)
    assert recent.encoded == 1
    other = copy.deepcopy(small[0])
    with torch.no_grad():
        other.model.multi_modal_projector.weight.mul_(1.5)
    trained = RecentPictures(other, small[1], folder=tmp_path)
    assert not torch.equal(trained(pages[:1]).states, first.states)
    assert trained.encoded == 1


def test_a_folder_that_is_full_is_named(small, pages, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    recent = RecentPictures(*small, folder=tmp_path / "kept")
    with pytest.raises(OSError, match=r"cannot keep encoded pictures here: No space left on device: .*kept") as raised:
        recent(pages[:1])
    assert raised.value.errno == errno.ENOSPC
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_is_not_allowed(small, pages):
    with pytest.raises(ValueError, match="most_bytes must be 0 or more"):
        RecentPictures(*small, most_bytes=-1)
    with pytest.raises(ValueError, match="No picture was given"):
        RecentPictures(*small).several([pages[:1], []])


def test_pictures_of_several_samples_go_through_the_tower_together(small, pages, calls):
    recent = RecentPictures(*small)
    recent(pages[:1])
    calls.clear()
    found = recent.several([pages[:2], pages[1:3], [pages[3].copy()], pages[3:]], at_a_time=2)
    assert calls == [2, 1]
    assert (recent.encoded, recent.reused) == (4, 3)
    assert found[2] is found[3]
    for own, one in zip((pages[:2], pages[1:3], pages[3:]), (found[0], found[1], found[3]), strict=True):
        expected = encode_pictures(*small, own)
        assert one.tiles == expected.tiles
        torch.testing.assert_close(one.states, expected.states, rtol=1e-4, atol=1e-4)


def test_a_picture_encoded_beside_others_holds_no_memory_of_theirs(small, pages):
    recent = RecentPictures(*small)
    found = recent.several([[page] for page in pages], at_a_time=len(pages))
    assert all(one.states.untyped_storage().nbytes() == one.states.nbytes for one in found)
    assert recent.nbytes == sum(one.nbytes for one in found)
