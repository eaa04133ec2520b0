"""The worker: the same answers as one by one, in the rows' order; what goes wrong stays in its row."""

from __future__ import annotations

import io
import os

import pytest
import torch
from PIL import Image

from trim_plugin.batching.worker import Worker
from trim_plugin.compat import cache_of
from trim_plugin.pictures.prompting import build_inputs, open_picture

from ..scenes import scene_rows


def alone(small, row, folder, **settings):
    """The answer of one `generate` for one row."""
    model, processor = small
    inputs = build_inputs(processor, row["question"], [open_picture(folder / name) for name in row["images"]])
    output = model.generate(
        **inputs, cache_implementation="trimmed", max_new_tokens=24, return_dict_in_generate=True, **settings
    )
    text = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return text, cache_of(output).report()


def test_same_answers_and_counts_as_one_by_one(worker, small, tmp_path):
    rows = scene_rows(tmp_path, 24)
    results = worker(rows)
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    for row, result in zip(rows, results, strict=True):
        text, report = alone(small, row, tmp_path, cache_config={"top_k_ratio": 0.1})
        assert result["answer"] == text
        assert (result["kept"], result["visible"]) == (report.kept_tokens[0], report.visible_tokens[0])
        assert 0 < result["tokens"] <= 24
        assert result["seconds"] > 0


def test_rows_of_every_kind_in_one_call(worker, small, tmp_path):
    first, second = scene_rows(tmp_path, 2)
    names = [*first["images"], *second["images"]]
    picture = open_picture(tmp_path / names[0])
    data = io.BytesIO()
    picture.save(data, "PNG")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first["question"]}]}]
    rows = [
        {**first, "images": [picture]},
        {**first, "images": [data.getvalue()]},
        {"images": first["images"], "messages": chat},
        {"images": first["images"], "messages": [{"role": "user", "content": first["question"]}]},
        {"images": names, "question": first["question"]},
        {"question": first["question"]},
        {"images": first["images"], "question": first["question"], "max_new_tokens": 1},
    ]
    results = worker(rows)
    expected, _ = alone(small, first, tmp_path, cache_config={"top_k_ratio": 0.1})
    assert [result["answer"] for result in results[:4]] == [expected] * 4
    both, report = alone(small, {**first, "images": names}, tmp_path, cache_config={"top_k_ratio": 0.1})
    assert (results[4]["answer"], results[4]["kept"]) == (both, report.kept_tokens[0])
    assert (results[5]["visible"], results[5]["kept"]) == (0, 0)
    assert results[6]["tokens"] == 1
    assert expected.startswith(results[6]["answer"])


#: By the names of rows in docs/errors.md, after "row-"; what follows a comma tells cases of one name apart.
BROKEN = {
    "picture-missing": ({"images": ["nowhere.png"], "question": "?"}, "no such picture"),
    "picture-unreadable, cut off": ({"images": ["half.png"], "question": "?"}, "cannot read"),
    "picture-unreadable, a text": ({"images": ["text.png"], "question": "?"}, "cannot read"),
    "picture-unreadable, postscript": ({"images": ["script.png"], "question": "?"}, "cannot read"),
    "picture-unreadable, a pipe": ({"images": ["pipe.png"], "question": "?"}, "cannot read"),
    "picture-too-large": ({"images": ["huge.png"], "question": "?"}, "decompression bomb"),
    "question-or-messages, none": ({"images": ["0.png"]}, "give either 'question' or 'messages'"),
    "question-or-messages, both": ({"question": "?", "messages": []}, "give either 'question' or 'messages'"),
    "question-empty": ({"images": ["0.png"], "question": "  "}, "'question' must be a text that is not empty"),
    "messages-empty": ({"messages": []}, "'messages' must be a list that is not empty"),
    "message-role": ({"messages": [{"content": "?"}]}, "a message must have a 'role' and a 'content'"),
    "message-content": ({"messages": [{"role": "user", "content": 7}]}, "'content' must be a text or a list of parts"),
    "message-part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of a message must be"),
    "unknown-field": ({"img": "0.png", "question": "?"}, "unknown field 'img'. Allowed: "),
    "images-not-a-list": ({"images": "0.png", "question": "?"}, "'images' must be a list"),
    "image-of-another-type": (
        {"images": [7], "question": "?"},
        "an image must be a file's name, its bytes or a picture",
    ),
    "pictures-not-named": (
        {"images": ["0.png"], "question": "<|image|>?"},
        "the prompt names 2 pictures (<|image|>), but 1",
    ),
    "pictures-not-named, too few": (
        {"images": ["0.png", "0.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "the prompt names 1 pictures (<|image|>), but 2",
    ),
    "picture-unreadable, a folder": ({"images": ["."], "question": "?"}, "cannot read"),
    "too-long": ({"question": "digit " * 600}, "but the model reads"),
    "too-long, very": ({"question": "digit " * 2_000_000}, "but the model reads"),
    "surrogate": ({"question": "\ud800"}, "half of a surrogate pair is no character"),
    "surrogate, in a chat": (
        {"messages": [{"role": "user", "content": "\udfff?"}]},
        "half of a surrogate pair is no character",
    ),
    "images-twice": ({"image": "0.png", "images": ["0.png"], "question": "?"}, "are both given: they mean the same"),
    "images-none": ({"pictures": [], "question": "?"}, "names no picture"),
    "answer-of-another-type": ({"question": "?", "answer": {}}, "'answer' must be a text or a list of texts"),
    "length-not-positive": ({"question": "?", "max_new_tokens": 0}, "'max_new_tokens' must be a positive number"),
    "not-an-object": (["0.png"], "a row must be an object"),
}


def broken_pictures(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    os.mkfifo(folder / "pipe.png")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")


def test_broken_rows_are_errors_and_the_rest_is_answered(worker, tmp_path):
    good = scene_rows(tmp_path, 6)
    broken_pictures(tmp_path)
    rows = []
    for place, (row, _) in enumerate(BROKEN.values()):
        rows += [row, good[place % len(good)]]
    results = worker(rows)
    for (row, message), result in zip(BROKEN.values(), results[::2], strict=True):
        assert message in result.get("error", "answered"), row
        assert "answer" not in result
    assert [result["answer"] for result in results[1::2]] == [
        worker([good[place % len(good)]])[0]["answer"] for place in range(len(BROKEN))
    ]


class Full:
    """A model that has memory for so many rows."""

    def __init__(self, model, most, error):
        self._model, self.most, self.error, self.batches = model, most, error, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, **inputs):
        self.batches.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > self.most:
            raise self.error
        return self._model.generate(**inputs)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_halves_the_batch_where_memory_runs_out_and_goes_on(small, worker, tmp_path, error):
    rows = scene_rows(tmp_path, 20)
    full = Full(small[0], 2, error)
    own = Worker(full, small[1], worker.config, batch_size=8, max_new_tokens=24, folder=tmp_path)
    results, expected = own(rows), worker(rows)
    assert [result["answer"] for result in results] == [result["answer"] for result in expected]
    assert own.batch_size == 2
    assert full.batches.count(8) <= 2, "batches that follow are small from the start (one may have been read before)"


def test_row_out_of_memory(small, tmp_path):
    own = Worker(Full(small[0], 0, MemoryError("all gone")), small[1], batch_size=4, folder=tmp_path)
    assert {result["error"] for result in own(scene_rows(tmp_path, 3))} == {"out of memory, even alone: all gone"}


def test_a_row_that_the_model_refuses_does_not_take_others_with_it(small, worker, tmp_path):
    rows = scene_rows(tmp_path, 5)

    class Picky(Full):
        def generate(self, **inputs):
            if inputs["input_ids"].eq(small[1].tokenizer.convert_tokens_to_ids("seven")).any():
                raise ValueError("not that one")
            return self._model.generate(**inputs)

    rows[2]["question"] = "Where is the seven?"
    own = Worker(Picky(small[0], 9, None), small[1], worker.config, batch_size=8, max_new_tokens=24, folder=tmp_path)
    results = own(rows)
    assert results[2] == {"id": "row 2", "error": "not that one"}
    del rows[2], results[2]
    assert [result["answer"] for result in results] == [result["answer"] for result in worker(rows)]
    assert own.batch_size == 8


def test_a_lost_device_is_no_row_s_fault(small, tmp_path):
    own = Worker(Full(small[0], 0, torch.AcceleratorError("gone")), small[1], batch_size=4, folder=tmp_path)
    with pytest.raises(torch.AcceleratorError):
        own(scene_rows(tmp_path, 3))


def test_no_rows(worker):
    assert worker([]) == []


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_new_tokens": True}, {"batch_size": 1.5}])
def test_worker_number_not_positive(small, settings):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Worker(*small, **settings)


def test_worker_static_and_encode(small):
    with pytest.raises(ValueError, match="encode and static=True are both given"):
        Worker(*small, {"static": True}, encode=lambda pictures: None)
