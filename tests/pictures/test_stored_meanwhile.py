"""Files of encoded pictures that other processes write, cut off and leave half written meanwhile."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import time

import torch

from trim_plugin import Pictures

from .conftest import assert_equal


def overwrite_for_ever(path, ready, contents):
    """Write files in place, cut them off, and put others there, as careless programs do."""
    ready.set()
    while True:
        for content in contents:
            with path.open("r+b") as file:
                file.truncate(0)
                file.write(content[: len(content) // 2])
                file.flush()
                file.write(content[len(content) // 2 :])


def test_a_file_that_is_overwritten_meanwhile_is_whole_or_an_error(page, tmp_path):
    path = tmp_path / "page.safetensors"
    other = copy.copy(page)
    other.states = page.states.repeat(1, 400) + 1  # of more than a page of memory
    known = {}
    for pictures in (page, other):
        pictures.save(path)
        known[pictures.states.shape] = (pictures, path.read_bytes())
    first = Pictures.load(path)
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    writer = forked.Process(
        target=overwrite_for_ever, args=(path, ready, [content for _, content in known.values()]), daemon=True
    )
    writer.start()
    assert ready.wait(60)
    seen, until = {"whole": 0, "error": 0}, time.monotonic() + 3
    while time.monotonic() < until or min(seen.values()) == 0:
        try:
            found = Pictures.load(path)
        except ValueError:
            seen["error"] += 1
        else:
            assert_equal(found, known[found.states.shape][0])
            seen["whole"] += 1
        assert time.monotonic() < until + 60, seen
    assert_equal(first, other)  # what was loaded before has not changed
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


def save_for_ever(pictures, path):
    while True:
        pictures.save(path)


def test_saves_that_are_killed_leave_nothing_behind(page, tmp_path):
    torch.set_num_threads(1)
    large = copy.copy(page)
    large.states = page.states.repeat(1, 2000)
    path = tmp_path / "page.safetensors"
    forked = multiprocessing.get_context("fork")
    left = []
    for _ in range(8):
        writer = forked.Process(target=save_for_ever, args=(large, path))
        writer.start()
        until = time.monotonic() + 60
        while not (drafts := [file for file in tmp_path.iterdir() if file != path]) and time.monotonic() < until:
            time.sleep(0.0005)
        assert drafts
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        left.append(len([file for file in tmp_path.iterdir() if file != path]))
    assert max(left) == 1, "some were killed in the middle, and each removed what the one before had left"
    page.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.safetensors"]
    assert_equal(Pictures.load(path), page)
