"""Pictures in a folder: encoded once, the same answers, and none of another model's."""

from __future__ import annotations

import copy

import torch

from trim_plugin import open_picture
from trim_plugin.batching.remembered import PictureFolder
from trim_plugin.batching.worker import Worker
from trim_plugin.embedded import examples

from ..scenes import scene_rows


def test_same_answers_and_every_picture_encoded_once(small, worker, tmp_path):
    rows = scene_rows(tmp_path, 6)
    several = [
        {**row, "id": f"{row['id']} {asked}", "question": asked}
        for row in rows
        for asked in ("Read all digits.", "How many digits?")
    ]
    several += [
        {"images": [*rows[0]["images"], *rows[1]["images"]], "question": "Read all digits."},
        {"question": "How many?"},
    ]
    several += [{"images": ["gone.png"], "question": "?"}]
    remember = PictureFolder(tmp_path / "encoded", *small)
    own = Worker(*small, worker.config, batch_size=8, max_new_tokens=24, folder=tmp_path, encode=remember)
    results, expected = own(several), worker(several)
    for result in (*results, *expected):
        result.pop("seconds", None)
    assert results == expected
    assert remember.encoded == 6
    again = PictureFolder(tmp_path / "encoded", *small)
    Worker(*small, worker.config, batch_size=8, max_new_tokens=24, folder=tmp_path, encode=again)(several)
    assert again.encoded == 0


def test_files_that_are_cut_off_or_of_another_model_are_written_anew(small, tmp_path):
    picture = open_picture(examples()[0].picture)
    first = PictureFolder(tmp_path, *small)([picture])
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    remember = PictureFolder(tmp_path, *small)
    assert torch.equal(remember([picture]).states, first.states)
    assert remember.encoded == 1
    other = copy.deepcopy(small[0])
    with torch.no_grad():
        other.model.multi_modal_projector.weight.mul_(1.5)
    trained = PictureFolder(tmp_path, other, small[1])
    assert not torch.equal(trained([picture]).states, first.states)
    assert trained.encoded == 1
