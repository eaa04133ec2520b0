"""What goes wrong while a worker answers: a row's own failures stay in the row, what is no row's fault ends the run."""

from __future__ import annotations

import contextlib
import itertools
import os

import pytest
import torch
from PIL import Image

from trim_plugin.batching.worker import RowsFail, Worker
from trim_plugin.pictures.prompting import open_picture

from ..scenes import scene_rows
from .conftest import without_seconds

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


@contextlib.contextmanager
def hooked(module, hook):
    """Calls `hook` with the module's first argument before every forward, which it may fail."""
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: hook(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def forwards(small, hook):
    """`hook` gets the hidden states of a layer."""
    return hooked(small[0].model.language_model.layers[1], hook)


def words(small, hook):
    """`hook` gets the tokens."""
    return hooked(small[0].get_input_embeddings(), hook)


def always(error):
    def fail(_):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_fewer_at_once_where_memory_runs_out(small, worker, tmp_path, error):
    rows = scene_rows(tmp_path, 20)
    expected, sizes = worker(rows), []

    def full(hidden):
        if len(hidden) > 2:
            raise error
        sizes.append(len(hidden))

    with forwards(small, full):
        results = worker(rows)
    assert without_seconds(results) == without_seconds(expected)
    assert max(sizes) == 2


def test_row_out_of_memory(small, worker, tmp_path):
    with forwards(small, always(MemoryError("all gone"))):
        results = worker(scene_rows(tmp_path, 40))
    assert len(results) == 40  # fewer pictures may fit: memory is a row's own matter, however many lack it
    assert {result["error"] for result in results} == {"out of memory, even alone: all gone"}


def test_row_that_could_never_fit(small, tmp_path):
    rows = scene_rows(tmp_path, 2)
    with contextlib.closing(Worker(*small, memory=100_000, max_new_tokens=2, folder=tmp_path)) as own:
        pictures, text = own([rows[0], {"question": "How many?"}])
    assert "bytes of keys and values, but the engine has 100000 in all" in pictures["error"]
    assert text["tokens"] <= 2


#: What a model's code may raise where it meets what nobody has thought of.
ODD = [KeyError("odd"), AttributeError("odd"), ZeroDivisionError("odd"), AssertionError("odd"), StopIteration("odd")]


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit("odd"), *ODD], ids=lambda error: type(error).__name__)
def test_a_row_that_the_model_refuses_does_not_take_others_with_it(small, worker, tmp_path, error):
    """While its prompt is read."""
    rows = scene_rows(tmp_path, 5)
    rows[2]["question"] = "Where is the seven?"
    expected = worker(rows)
    seven = small[1].tokenizer.convert_tokens_to_ids("seven")

    def picky(tokens):
        if tokens.eq(seven).any() and tokens.shape[1] > 1:
            raise error

    with words(small, picky):
        results = worker(rows)
    assert results[2].keys() == {"id", "error"}
    assert results[2]["id"] == "row 2"
    assert "odd" in results[2]["error"]
    assert type(error) not in map(type, ODD) or results[2]["error"].startswith(type(error).__name__)
    del rows[2], results[2], expected[2]
    assert without_seconds(results) == without_seconds(expected)


@pytest.mark.parametrize("error", [RuntimeError("odd"), *ODD], ids=lambda error: type(error).__name__)
def test_a_step_that_fails_is_the_failure_of_one_row(small, worker, tmp_path, error):
    """Those that ran beside it are answered again."""
    rows = scene_rows(tmp_path, 16)
    expected = worker(rows)
    tokenizer = small[1].tokenizer
    written = [tokenizer(result["answer"], add_special_tokens=False)["input_ids"] for result in expected]
    poison = min({token for tokens in written for token in tokens}, key=lambda token: sum(token in w for w in written))
    whose = [place for place, tokens in enumerate(written) if poison in tokens]
    assert 0 < len(whose) < 4

    def picky(tokens):
        if tokens.shape[1] == 1 and tokens.eq(poison).any():
            raise error

    with words(small, picky):
        results = worker(rows)
    assert [place for place, result in enumerate(results) if "error" in result] == whose
    assert all("odd" in results[place]["error"] for place in whose)
    others = [place for place in range(16) if place not in whose]
    assert without_seconds(results[place] for place in others) == without_seconds(expected[place] for place in others)


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_a_picture_that_fails_oddly_is_the_failure_of_one_row(worker, tmp_path, error):
    """Before anything is asked of the model."""

    class Odd(Image.Image):
        def load(self):
            raise error

    rows = scene_rows(tmp_path, 3)
    expected = worker(rows)
    picture = open_picture(tmp_path / rows[1]["images"][0])
    picture.__class__ = Odd
    rows[1] = {**rows[1], "images": [picture]}
    results = worker(rows)
    assert results[1].keys() == {"id", "error"}
    assert "odd" in results[1]["error"]
    assert without_seconds(results[::2]) == without_seconds(expected[::2])


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("gone"), OSError("No space left on device")],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_device_or_a_full_disk_is_no_row_s_fault(small, worker, tmp_path, error):
    with forwards(small, always(error)), pytest.raises(type(error)):
        worker(scene_rows(tmp_path, 3))


@pytest.mark.parametrize(
    "error", [KeyError("odd"), RuntimeError("odd"), TypeError("odd")], ids=lambda e: type(e).__name__
)
def test_rows_that_all_fail_alike(small, worker, tmp_path, error):
    """A mistake in the model's code, or a device that is broken in a way of its own: thousands need not fail of it."""
    rows, found = scene_rows(tmp_path, 100), []
    with forwards(small, always(error)), pytest.raises(RowsFail, match=r"16 rows in a row .*odd") as raised:  # noqa: PT012
        for some in worker.answers(rows):
            found += some
    assert raised.value.__cause__ is error
    assert 16 <= len(found) < 40  # and these have their errors
    assert all("odd" in result["error"] for _, result in found)
    assert "answer" in worker(rows[:1])[0]  # the worker is as it was


def test_steps_that_all_fail_alike(small, worker, tmp_path):
    """Each row gets as far as its first token."""

    def fail(hidden):
        if hidden.shape[1] == 1:
            raise KeyError("odd")

    rows = [{**row, "question": "Read all digits."} for row in scene_rows(tmp_path, 300)]
    with forwards(small, fail), pytest.raises(RowsFail):
        worker(rows)


def test_rows_that_fail_alike_beside_one_that_is_answered(small, tmp_path, monkeypatch):
    """Many bad rows in a row, and the one good row among them has a long answer."""
    monkeypatch.setattr(small[0].generation_config, "eos_token_id", None)
    rows = [{**row, "max_new_tokens": 2} for row in scene_rows(tmp_path, 30)]
    rows[0]["max_new_tokens"] = 450
    for row in rows[1:25]:
        row["question"] = "Where is the seven?"
    seven = small[1].tokenizer.convert_tokens_to_ids("seven")

    def picky(tokens):
        if tokens.eq(seven).any() and tokens.shape[1] > 1:
            raise KeyError("odd")

    with words(small, picky), contextlib.closing(Worker(*small, max_running=8, folder=tmp_path)) as own:
        results = own(rows)
    assert [place for place, result in enumerate(results) if "error" in result] == list(range(1, 25))


def test_rows_that_fail_in_several_ways(small, worker, tmp_path):
    """They have nothing in common that could be the model's or the device's fault."""
    kinds = itertools.cycle(ODD)

    def fail(_):
        raise next(kinds)

    with forwards(small, fail):
        results = worker(scene_rows(tmp_path, 40))
    assert all("odd" in result["error"] for result in results)
